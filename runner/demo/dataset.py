"""Token streams for training and evaluation: the corpus, tokenized once, cut into windows.

It knows text, token ids and bytes; it must not know the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from runner.demo.tokenizer import BOS_ID

# How byte-level vocabularies write a blank.
_BLANK = "\u0120"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Texts one after the other as token ids, each after a BOS.

    Attributes:
        ids: [tokens] int64.
        text_bytes: UTF-8 bytes of the texts, the base of bits per byte.
        line_starts: Positions in `ids` at which a line begins, ascending.
    """

    ids: Tensor
    text_bytes: int
    line_starts: Tensor


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> Stream:
    """Encode the texts into one stream."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.append(BOS_ID)
        ids.extend(encoding.ids)
    stream = torch.tensor(ids)
    vocabulary = range(tokenizer.get_vocab_size())
    ends_line = torch.tensor([token == BOS_ID or tokenizer.decode([token]).endswith("\n") for token in vocabulary])
    return Stream(
        ids=stream,
        text_bytes=sum(len(text.encode()) for text in texts),
        line_starts=torch.nonzero(ends_line[stream[:-1]]).flatten() + 1,
    )


def loosen(stream: Stream, tokenizer: Tokenizer, generator: torch.Generator, *, share: float = 0.1) -> Stream:
    """Cut some words off the blank before them, at random places in the stream.

    The tokenizer joins a blank to the word that follows, so a text never has a blank of its own before a word. A
    prompt such as "import " ends in one, and a model that has not seen it continues with anything but a module.

    Args:
        stream: The text as the tokenizer cuts it.
        tokenizer: The tokenizer.
        generator: Source of the places.
        share: Part of the words to cut off, of those that are tokens without their blank too.
    """
    (blank,) = tokenizer.encode(" ").ids
    word_of = [-1] * tokenizer.get_vocab_size()
    for token, token_id in tokenizer.get_vocab().items():
        word = tokenizer.token_to_id(token[1:]) if token.startswith(_BLANK) else None
        # Runs of blanks are indentation, which a prompt ends in as it is.
        if word is not None and not token[1:].startswith(_BLANK):
            word_of[token_id] = word
    words = torch.tensor(word_of)[stream.ids]
    cut = (words >= 0) & (torch.rand(len(stream.ids), generator=generator) < share)
    sizes = 1 + cut.long()
    starts = sizes.cumsum(0) - sizes
    ids = stream.ids.repeat_interleave(sizes)
    ids[starts[cut]] = blank
    ids[starts[cut] + 1] = words[cut]
    return Stream(ids=ids, text_bytes=stream.text_bytes, line_starts=starts[stream.line_starts])


def windows(stream: Stream, starts: Tensor, length: int) -> Tensor:
    """A BOS and `length` + 1 tokens from each of `starts` [B] -> [B, length + 2]."""
    positions = starts.unsqueeze(1) + torch.arange(-1, length + 1)
    batch = stream.ids[positions]
    batch[:, 0] = BOS_ID
    return batch


def training_starts(stream: Stream, length: int, generator: torch.Generator) -> Iterator[int]:
    """Yield window starts for ever: every epoch covers the stream once, in a new order and with a new offset.

    A start is moved to the next line: prompts begin at a line, after a BOS, and so must what the model learns from.
    """
    last = len(stream.ids) - length - 1
    while True:
        offset = 1 + int(torch.randint(0, length, (1,), generator=generator))
        starts = torch.arange(offset, last, length)
        lines = torch.searchsorted(stream.line_starts, starts).clamp(max=len(stream.line_starts) - 1)
        starts = stream.line_starts[lines].clamp(max=last)
        yield from starts[torch.randperm(len(starts), generator=generator)].tolist()


def evaluation_starts(stream: Stream, length: int) -> Tensor:
    """Starts of windows that lie end to end over the whole stream: every token but a last rest is predicted once."""
    return torch.arange(1, len(stream.ids) - length, length)
