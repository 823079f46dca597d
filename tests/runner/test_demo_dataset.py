"""The tokenizer's training and the token windows, on a text of a few lines."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
import torch
from tokenizers import Tokenizer

from runner.demo.dataset import Stream, evaluation_starts, loosen, tokenize, training_starts, windows
from runner.demo.tokenizer import BOS, BOS_ID, CONTROL_TOKENS, EOS, PAD, THINK_TOKENS, train_tokenizer

TEXTS = ["import os\nx = 1234\n", "def f():\n    return x\n"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 285)


def test_ids_fill_the_vocabulary_with_special_tokens_at_both_ends(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(285))
    assert [tokenizer.token_to_id(token) for token in (EOS, PAD)] == [1, 2]
    last = [*THINK_TOKENS, *CONTROL_TOKENS]
    assert [tokenizer.token_to_id(token) for token in last] == list(range(285 - len(last), 285))


def test_text_is_split_as_published(tokenizer: Tokenizer) -> None:
    split = tokenizer.pre_tokenizer.pre_tokenize_str("x = 1234\u4f60a.b\n\n  y")
    assert [span for _, span in split] == [
        (0, 1), (1, 3), (3, 4), (4, 7), (7, 8), (8, 9), (9, 10), (10, 12), (12, 14), (14, 15), (15, 17),
    ]  # fmt: skip


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="not 4096: use more text"):
        train_tokenizer(TEXTS, 4096)


def test_a_stream_has_a_bos_before_each_text_and_knows_its_lines(tokenizer: Tokenizer) -> None:
    stream = tokenize(tokenizer, TEXTS)
    assert stream.text_bytes == sum(map(len, TEXTS))
    lines = [stream.ids[start:].tolist() for start in stream.line_starts]
    first_lines = [tokenizer.decode(line, skip_special_tokens=False).split("\n")[0] for line in lines]
    assert first_lines == ["import os", "x = 1234", f"{BOS}def f():", "def f():", "    return x"]
    assert [position.item() for position in (stream.ids == BOS_ID).nonzero()] == [0, stream.line_starts[2]]


def test_a_loosened_stream_is_the_same_text_with_words_cut_off_their_blanks() -> None:
    text = "return x\n    return x\nx x\n" * 50
    tokenizer = train_tokenizer([text], 285)
    stream = tokenize(tokenizer, [text])
    loose = loosen(stream, tokenizer, torch.Generator().manual_seed(0), share=0.5)
    assert tokenizer.decode(loose.ids.tolist()) == text
    # " x" and " return" are tokens, with and without their blank; the blanks of an indentation stay together.
    joined, cut = (tokenizer.token_to_id(token) for token in ("\u0120x", "\u0120"))
    assert (stream.ids == joined).sum() == 150
    assert 50 < (loose.ids == joined).sum() < 100
    words = {tokenizer.token_to_id("x"), tokenizer.token_to_id("return")}
    after = {following for token, following in pairwise(loose.ids.tolist()) if token == cut}
    assert after == words
    first_words = [tokenizer.decode(loose.ids[start:].tolist()).split("\n")[0] for start in loose.line_starts]
    assert first_words == text.splitlines()


def test_windows_begin_with_a_bos_in_place_of_the_token_before() -> None:
    stream = Stream(ids=torch.arange(100, 150), text_bytes=50, line_starts=torch.arange(50))
    batch = windows(stream, torch.tensor([1, 7]), 3)
    assert batch.tolist() == [[BOS_ID, 101, 102, 103, 104], [BOS_ID, 107, 108, 109, 110]]


def test_evaluation_windows_predict_every_token_once() -> None:
    stream = Stream(ids=torch.arange(23), text_bytes=23, line_starts=torch.arange(23))
    batch = windows(stream, evaluation_starts(stream, 5), 5)
    assert batch[:, 1:-1].flatten().tolist() == list(range(1, 21))


def test_training_windows_start_at_lines_and_cover_the_stream() -> None:
    stream = Stream(ids=torch.arange(1000), text_bytes=1000, line_starts=torch.arange(4, 1000, 4))
    epoch = list(islice(training_starts(stream, 20, torch.Generator().manual_seed(0)), 49))
    assert all(start % 4 == 0 for start in epoch)
    assert epoch != sorted(epoch)
    gaps = torch.tensor(sorted(epoch)).diff()
    assert set(gaps.tolist()) == {20}
    assert min(epoch) <= 24
    assert max(epoch) + 21 < 1000  # a window has one token more than its length, after the BOS
