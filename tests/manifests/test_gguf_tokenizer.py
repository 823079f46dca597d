"""Tokenizers that went through a GGUF file give the ids that the original gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import manifests
from manifests.errors import ManifestError, UnsupportedModelError
from manifests.gguf import read_gguf
from manifests.gguf_pretokenizers import find_pre_tokenizer
from manifests.gguf_tokenizer import tokenizer_documents
from tests.gguf_tokenizers import (
    ASSISTANT,
    BOS,
    EOS,
    EOT,
    HOLE,
    PAD,
    TEMPLATE,
    TEXTS,
    THINK,
    TRAINING,
    USER,
    edges,
    published,
    train,
    write_tokenizer,
)

NAMES = ["deepseek-llm", "deepseek-v3", "gpt-2", "kimi-k2"]
PREFIX = "tokenizer.ggml."

Pair = tuple[Tokenizer, Tokenizer]
Metadata = dict[str, Any]


@pytest.fixture(scope="module")
def originals() -> dict[str, Tokenizer]:
    return {name: train(name, TRAINING) for name in NAMES}


@pytest.fixture(scope="module")
def pairs(originals: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """By name of the pre-tokenizer: the original, and what came out of the GGUF file."""
    found = {}
    for name, original in originals.items():
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        write_tokenizer(path, original, name)
        documents = tokenizer_documents(read_gguf(path).metadata)
        found[name] = original, Tokenizer.from_buffer(documents["tokenizer.json"])
    return found


@pytest.fixture(scope="module")
def metadata(originals: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Metadata:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_tokenizer(path, originals["deepseek-v3"], "deepseek-v3")
    return dict(read_gguf(path).metadata)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# --- the same ids ---


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_originals(pairs: dict[str, Pair], name: str, text: str) -> None:
    original, ours = pairs[name]
    assert ids(ours, text) == ids(original, text)
    assert ours.decode(ids(ours, text), skip_special_tokens=False) == text


PIECES = st.sampled_from(
    [*TEXTS.values(), BOS, USER, EOT, THINK, " ", "\n", "\r\n", "\t", "7", "12345", "\u200d", "'s"]
)


@settings(deadline=None, max_examples=300)
@given(parts=st.lists(st.text(max_size=20) | PIECES.map(lambda text: text[:30]), max_size=8))
@pytest.mark.parametrize("name", NAMES)
def test_ids_of_any_text_are_the_originals(pairs: dict[str, Pair], name: str, parts: list[str]) -> None:
    original, ours = pairs[name]
    text = "".join(parts)
    assert ids(ours, text) == ids(original, text)
    assert ours.decode(ids(ours, text), skip_special_tokens=False) == text


@pytest.mark.parametrize("name", NAMES)
def test_tokens_have_their_ids_and_fillers_have_none(pairs: dict[str, Pair], name: str) -> None:
    original, ours = pairs[name]
    assert ours.get_vocab(with_added_tokens=True) == original.get_vocab(with_added_tokens=True)


def test_fillers_of_older_converters_are_left_out(originals: dict[str, Tokenizer], tmp_path: Path) -> None:
    original = originals["deepseek-llm"]
    write_tokenizer(tmp_path / "model.gguf", original, "deepseek-llm", filler=4)
    documents = tokenizer_documents(read_gguf(tmp_path / "model.gguf").metadata)
    ours = Tokenizer.from_buffer(documents["tokenizer.json"])
    assert ours.get_vocab() == original.get_vocab()
    assert ids(ours, TEXTS["fillers"]) == ids(original, TEXTS["fillers"])


def test_an_id_behind_a_hole_is_kept(metadata: Metadata) -> None:
    tokens, types = list(metadata[PREFIX + "tokens"]), list(metadata[PREFIX + "token_type"])
    tokens[-1], types[-1] = "<late>", 4
    found = documents_of(metadata, tokens=tuple(tokens), token_type=tuple(types))
    ours = Tokenizer.from_buffer(found["tokenizer.json"])
    assert ids(ours, "a<late>")[-1] == len(tokens) - 1


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_cut_as_published(name: str) -> None:
    ours = Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    ours = Tokenizer.from_str(json.dumps(json.loads(ours.to_str()) | {"pre_tokenizer": find_pre_tokenizer(name)}))
    theirs = published(name)
    assert ours.pre_tokenizer is not None
    # Between letters, digits and blanks, so that a range that ends elsewhere is seen.
    for mark in [*map(chr, range(0x3100)), *edges()]:
        text = f"a{mark}{mark} {mark}1\n{mark}{mark}A {mark}  "
        assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), hex(ord(mark))


# --- what else is in the files ---


def test_special_tokens_follow_their_type(pairs: dict[str, Pair]) -> None:
    added = {token.content: token.special for token in pairs["deepseek-v3"][1].get_added_tokens_decoder().values()}
    control = dict.fromkeys([BOS, EOS, PAD, HOLE, USER, ASSISTANT, EOT], True)
    assert added == control | {THINK: False}


def test_bos_is_added_where_the_model_wants_it(metadata: Metadata) -> None:
    ours = Tokenizer.from_buffer(tokenizer_documents(metadata)["tokenizer.json"])
    plain = ids(ours, "hi")
    assert ours.encode("hi").ids == [0, *plain]
    assert ours.encode("hi", "hi").ids == [0, *plain, 0, *plain]
    both = Tokenizer.from_buffer(documents_of(metadata, add_eos_token=True)["tokenizer.json"])
    assert both.encode("hi").ids == [0, *plain, 1]
    neither = Tokenizer.from_buffer(documents_of(metadata, add_bos_token=None)["tokenizer.json"])
    assert neither.encode("hi").ids == plain


def test_settings(metadata: Metadata) -> None:
    assert json.loads(tokenizer_documents(metadata)["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": TEMPLATE,
    }


def test_what_the_file_does_not_say_is_left_out(metadata: Metadata) -> None:
    bare = dict.fromkeys(("bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token", "add_eos_token"))
    found = documents_of(metadata | {"tokenizer.chat_template": None}, **bare)
    assert set(json.loads(found["tokenizer_config.json"])) == {"tokenizer_class", "clean_up_tokenization_spaces"}


def test_the_same_metadata_gives_the_same_bytes(metadata: Metadata) -> None:
    backwards = dict(reversed(metadata.items()))
    assert tokenizer_documents(metadata) == tokenizer_documents(backwards)


def test_a_file_with_tensors_alone_has_no_tokenizer() -> None:
    assert tokenizer_documents({"general.architecture": "deepseek2"}) == {}


# --- what is refused ---


def documents_of(metadata: Metadata, **change: Any) -> dict[str, bytes]:
    """The files with other values; None for a key that is left out."""
    changed = metadata | {PREFIX + key: value for key, value in change.items()}
    return tokenizer_documents({key: value for key, value in changed.items() if value is not None})


def one_other(key: str, place: int, value: object) -> Callable[[Metadata], dict[str, Any]]:
    """A change of one element of an array."""

    def change(metadata: Metadata) -> dict[str, Any]:
        values = list(metadata[PREFIX + key])
        values[place] = value
        return {key: tuple(values)}

    return change


def always(**change: Any) -> Callable[[Metadata], dict[str, Any]]:
    return lambda _: change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (always(model=None), r"without tokenizer\.ggml\.model"),
        (always(pre=None), r"without tokenizer\.ggml\.pre"),
        (always(tokens=None), r"without tokenizer\.ggml\.tokens"),
        (always(token_type=None), r"without tokenizer\.ggml\.token_type"),
        (always(merges=None), r"without tokenizer\.ggml\.merges"),
        (always(model=3), r"tokenizer\.ggml\.model 3; it must be a string"),
        (always(tokens="a"), r"it must be an array of strings"),
        (always(merges=(1, 2)), r"tokenizer\.ggml\.merges of other values; it must be an array of strings"),
        (one_other("token_type", 0, True), r"must be an array of whole numbers"),
        (always(token_type=(1,)), r"tokens and 1 token types"),
        (one_other("tokens", 4, ""), "token 4 without a text"),
        (one_other("tokens", 4, BOS), "twice, as 0 and 4"),
        (one_other("merges", 1, "ab"), "merge 1 'ab'; it must be two tokens"),
        (one_other("merges", 1, "a  b"), "merge 1 'a  b'; it must be two tokens"),
        (one_other("merges", 1, "a b c"), "merge 1 'a b c'; it must be two tokens"),
        (one_other("merges", 1, " b"), "merge 1 ' b'; it must be two tokens"),
        (one_other("merges", 1, "a "), "merge 1 'a '; it must be two tokens"),
        (one_other("merges", 1, "~ ~"), "'~~' is not one of its tokens"),
        (always(bos_token_id=100_000), "bos_token_id 100000, which is none of its tokens"),
        (always(eos_token_id=-(10**6)), "eos_token_id -1000000, which is none of its tokens"),
        (always(eos_token_id=True), "eos_token_id True; it must be a whole number"),
        (always(padding_token_id=1.0), "padding_token_id 1.0; it must be a whole number"),
        (always(bos_token_id=None), "add_bos_token without tokenizer.ggml.bos_token_id"),
        (always(add_bos_token=1), "add_bos_token 1; it must be a truth value"),
    ],
)
def test_damage_is_refused(metadata: Metadata, change: Callable[[Metadata], dict[str, Any]], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        documents_of(metadata, **change(metadata))


def test_a_merge_of_what_is_no_token_is_refused(metadata: Metadata) -> None:
    tokens = set(metadata[PREFIX + "tokens"])
    cuts = [(token[:place], token[place:]) for token in sorted(tokens) for place in range(1, len(token))]
    without_left = next(pair for pair in cuts if pair[0] not in tokens and pair[1] in tokens)
    without_right = next(pair for pair in cuts if pair[0] in tokens and pair[1] not in tokens)
    for left, right in (without_left, without_right):
        with pytest.raises(ManifestError, match="is not one of its tokens"):
            documents_of(metadata, merges=(f"{left} {right}",))


def test_a_role_of_a_filler_is_refused(metadata: Metadata) -> None:
    last = len(metadata[PREFIX + "tokens"]) - 1
    with pytest.raises(ManifestError, match="none of its tokens"):
        documents_of(metadata, bos_token_id=last)


def test_a_template_that_is_no_text_is_refused(metadata: Metadata) -> None:
    with pytest.raises(ManifestError, match=r"tokenizer\.chat_template 3; it must be a string"):
        tokenizer_documents(metadata | {"tokenizer.chat_template": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (always(model="llama"), r"tokenizer\.ggml\.model 'llama'"),
        (always(pre="llama-bpe"), r"tokenizer\.ggml\.pre 'llama-bpe', and how that cuts texts is not known"),
        (always(pre="default"), r"tokenizer\.ggml\.pre 'default'"),
        (one_other("token_type", 9, 6), r"token 9 .* of type 6"),
        (one_other("token_type", 9, 2), r"token 9 .* of type 2"),
    ],
)
def test_what_is_not_known_is_refused(
    metadata: Metadata, change: Callable[[Metadata], dict[str, Any]], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        documents_of(metadata, **change(metadata))


# --- through a checkpoint ---


def test_a_checkpoint_has_the_files_of_its_gguf_file(originals: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_tokenizer(path, originals["deepseek-v3"], "deepseek-v3")
    expected = tokenizer_documents(read_gguf(path).metadata)
    for opened in (manifests.open(path), manifests.open(tmp_path)):
        auxiliary = opened.auxiliary
        for name, raw in expected.items():
            assert auxiliary.read(name, max_bytes=1) == raw  # the limit is for files
            assert auxiliary.where(name) == f"{name} of the GGUF file in {tmp_path}"
        assert auxiliary.read("generation_config.json", max_bytes=1) is None
        assert auxiliary.derived_from == path.stat().st_size
    (tmp_path / "tokenizer.json").write_bytes(b"its own")
    assert auxiliary.read("tokenizer.json", max_bytes=10) == b"its own"
    assert auxiliary.read("tokenizer_config.json", max_bytes=10) == expected["tokenizer_config.json"]
