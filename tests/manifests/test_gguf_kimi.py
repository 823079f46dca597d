"""Kimi-K2's tokenizer, which has no tokenizer.json: cut and merged as tiktoken does with the published expression.

The oracle is another engine for the expression, and tiktoken's way of merging, written out. tiktoken itself agrees with
the tokenizers library on the class of every code point.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import regex
from tokenizers import Tokenizer

from manifests.gguf import read_gguf
from manifests.gguf_pretokenizers import find_pre_tokenizer
from manifests.gguf_tokenizer import tokenizer_documents
from tests.gguf_tokenizers import TEXTS, TRAINING, train

PUBLISHED = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""pat_str of tokenization_kimi.py."""

PIECE = regex.compile(f"(?V1){PUBLISHED}")
MOVED = "\u0295"
"""A letter that changed its class between versions of Unicode, as code points without a name may."""

POOLS = (
    "abcdXYZ",
    "'sStTrReEvVmMlLdD'\u017f\u2019",
    "  \t\n\r\u00a0\u3000\u2028\x0b\x85",
    "0123456789\u0663\u00bd\u2167\u3007\u3021",
    "\u4e2d\u6587\u6df7\u3005\u2f00\uf900\U00020000",
    "\u3042\u30ab\u30fc\u3099\uac00\ud55c",
    "e\u0301\u0345\u093f\u0e31\u20dd",
    "\u01c5\u1f88\u02b0\u0294\u00aa\u1d2c",
    "!?.,()[]<|>\u3002\uff0c\u20ac+=",
    "\U0001f600\u200d\ufe0f\U0001f3fd",
    "\u0434\u0416\u03a9\u03c2\u05e9\u0645",
)
NAMED = [chr(point) for point in range(0x30000) if unicodedata.category(chr(point)) not in ("Cn", "Cs")]


def texts(count: int) -> Iterator[str]:
    """Scripts side by side, which is where expressions differ."""
    source = random.Random(7)
    for _ in range(count):
        pools = (source.choice((*POOLS, NAMED)) for _ in range(source.randint(1, 12)))
        yield "".join(source.choice(pool) for pool in pools for _ in range(source.randint(1, 4))).replace(MOVED, "")


@pytest.fixture(scope="module")
def cutter() -> Tokenizer:
    empty = Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    cut = {"pre_tokenizer": find_pre_tokenizer("kimi-k2")}
    return Tokenizer.from_str(json.dumps(json.loads(empty.to_str()) | cut))


def pieces(cutter: Tokenizer, text: str) -> list[str]:
    assert cutter.pre_tokenizer is not None
    return [text[begin:end] for _, (begin, end) in cutter.pre_tokenizer.pre_tokenize_str(text)]


def test_texts_are_cut_as_published(cutter: Tokenizer) -> None:
    for text in (*texts(20_000), *TEXTS.values()):
        found = PIECE.findall(text)
        assert "".join(found) == text
        assert pieces(cutter, text) == found, text


def test_every_letter_is_cut_as_published(cutter: Tokenizer) -> None:
    for mark in NAMED:
        text = f"a{mark}{mark} {mark}1\n{mark}{mark}A {mark}  x'S{mark}B{mark}b"
        assert mark == MOVED or pieces(cutter, text) == PIECE.findall(text), hex(ord(mark))


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's letter for each byte: the byte's own where that can be seen, else the next from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in seen else next(hidden)) for byte in range(256)}


def encode(ranks: dict[bytes, int], text: str) -> list[int]:
    """As tiktoken does: a piece that is a token is that; else the pair of the lowest rank is merged, the leftmost."""
    found = []
    for piece in PIECE.findall(text):
        word = piece.encode()
        found += [ranks[part] for part in ([word] if word in ranks else merge(ranks, word, len(ranks)))]
    return found


def merge(ranks: dict[bytes, int], word: bytes, limit: int) -> list[bytes]:
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks.get(parts[at] + parts[at + 1], limit), at) for at in range(len(parts) - 1)]
        rank, at = min(pairs, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_ids_are_those_of_tiktoken(tmp_path: Path) -> None:
    """The file is written as the converter does: of ranks, and of those merges that lead to a token."""
    as_text = bytes_to_unicode()
    as_byte = {letter: byte for byte, letter in as_text.items()}
    vocab = train("kimi-k2", TRAINING).get_vocab(with_added_tokens=False)
    words = [bytes(map(as_byte.__getitem__, token)) for token in vocab if set(token) <= as_byte.keys()]
    words.sort(key=lambda word: (len(word) > 1, vocab["".join(map(as_text.__getitem__, word))]))
    # No merge leads to these two.
    ranks = {word: number for number, word in enumerate([*words, b" qzjx", b"zqzq"])}

    def named(word: bytes) -> str:
        return "".join(as_text[byte] for byte in word)

    halves = [merge(ranks, word, rank) for word, rank in ranks.items() if len(word) > 1]
    merges = [" ".join(map(named, pair)) for pair in halves if len(pair) == 2]
    assert len(merges) == len(ranks) - 256 - 2 > 500
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "deepseek2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("kimi-k2")
    writer.add_token_list([*map(named, ranks), "<|im_end|>", "[PAD9]"])
    writer.add_token_types([*[1] * len(ranks), 3, 5])
    writer.add_token_merges(merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    documents = tokenizer_documents(read_gguf(tmp_path / "model.gguf").metadata)
    ours = Tokenizer.from_buffer(documents["tokenizer.json"])
    assert ours.encode("a<|im_end|>").ids[-1] == len(ranks)
    for text in ("x qzjx zqzq zqzqz", *(text[:2000] for text in TEXTS.values()), *texts(3000)):
        if "<|im_end|>" not in text:
            assert ours.encode(text).ids == encode(ranks, text), text
            assert ours.decode(ours.encode(text).ids) == text
