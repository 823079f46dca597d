"""What hostile and broken writers put into JSON, and a writer for it, since Python's own would not write it.

This file knows JSON and what kinds of values headers and manifests have; it changes nothing.
"""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

# What Python's writer would not write is put in as a string of this form, and its quotes are taken off afterwards.
SAME = "<<same:"


def _raw(text: str) -> str:
    return f"<<raw:{text}>>"


def dump(tree: Any, *, ascii_only: bool = True, sort: bool = False, indent: int | None = None) -> bytes:
    """Write a tree with its raw parts."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(tree, ensure_ascii=ascii_only, sort_keys=sort, indent=indent, separators=separators)
    text = text.replace('"<<raw:', "").replace('>>"', "")
    # A key that is there once more has a digit behind the mark, which made it another key until now.
    first, *others = text.split(SAME)
    text = first + "".join(other[1:] for other in others)
    return text.encode("utf-8", "surrogatepass")


NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 7, 4095, 4096, 4097, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 100_000_008, 100_000_009,
    2**61, 2**62 - 1, 2**62, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63), 10**40,
    1.0, 0.5, -0.0, 1e308, 5e-324, True, False,
    _raw("-0"), _raw("1e2"), _raw("1E400"), _raw("-1e400"), _raw("NaN"), _raw("-Infinity"), _raw("01"), _raw("+1"),
    _raw("9" * 4300), _raw("9" * 4301), _raw("1." + "0" * 5000),
)  # fmt: skip
STRINGS = (
    "", " ", "x", "0", "true", "null", "\x00", "\x1b[2J", "a\nb", "\u202e", "\u2028", "\ufeff", "\xad", "\x7f", "\x85",
    "\ud800", "\udfff\ud800", "\U0001f600", "e\u0301", "\xe9", "\u0130", "\u212a", "\u017f", "\xdf", "\uff11", "\xb2",
    "x" * 1024, "x" * 1025, "\U0001f600" * 1024, "x" * 100_000, "__metadata__", "manifest_sha256", "weight_map",
    '"manifest_sha256":"' + "0" * 64 + '"',
)  # fmt: skip
ESCAPES = (
    "../outside.safetensors", "sub/../../outside.safetensors", "./../outside.safetensors", "link.safetensors",
    "linked/outside.safetensors", "fifo.safetensors", "folder.safetensors", "/etc/passwd", "..\\outside.safetensors",
)  # fmt: skip
"""Paths that lead out of a folder, some through links that `targets` puts there, or to what must not be opened."""

PATHS = (
    *ESCAPES, "//server/share/x.safetensors", "C:x.safetensors", "C:\\x.safetensors", ".", "..", "./x.safetensors",
    "a//b.safetensors", "a/", "/", "a/./b.safetensors", "~/x.safetensors", "...",
    "x" * 300 + ".safetensors", "a/" * 600 + "x.safetensors", "x.safetensors\x00", "x\n.safetensors", "NUL.safetensors",
    "model.safetensors.index.json", "manifest.json", "MANIFEST.json", "CONFIG.json", "config.json", "config.json/x",
    "layers/3/dense.safetensors", "layers/0/experts/0.safetensors", "layers/\uff11/dense.safetensors", "source",
    "layers/00003/dense.safetensors", "model/embed.safetensors", "Model/embed.safetensors", "-rf",
    "source/headers/0.zst", "model/embed.safetensors.zst", "Source/headers/0.zst", "model-1-of-2.safetensors",
    ".hidden", "MODEL-1-of-2.safetensors", "missing.safetensors", "a\\b",
    "a:b", "%2e%2e/x", "\u2024\u2024/x", "reshard-journal.jsonl", "Manifest.json.aside", "model/x.partial", "layers",
)  # fmt: skip
DIGESTS = (
    "0" * 64, "A" * 64, "a" * 63, "a" * 65, "g" * 64, "\uff11" * 64, " " + "a" * 63, "a" * 63 + "\n", "0x" + "a" * 62,
)  # fmt: skip
WORDS = (
    "F8_E4M3", "f32", "F32 ", "F4", "F6_E2M3", "BOOL", "C64", "U64", "I128", "FP8", "none", "zstd", "plain", "shard",
    "in_place", "resharded", "expert", "dense", "source_header", "auxiliary", "index", "q8_0",
)  # fmt: skip
SHAPES: tuple[Any, ...] = (
    [], [0], [-1], [1.0], [True], [None], ["1"], [[1]], [0, 2**62, 2**62], [2**62, 4, 0], [2**32, 2**32], [2**63],
    [2**31, 2**31], [1] * 64, [1] * 65, [2] * 62, [2] * 200, [2**62] * 17, [2**62] * 300, [1] * 9000, [3, 5, 7],
    [1, 0, 1],
)  # fmt: skip
_BY_KEY: dict[Any, tuple[Any, ...]] = {
    **dict.fromkeys(("path", "name", "source_name", "header"), PATHS),
    **dict.fromkeys(("digest", "sha256", "header_sha256", "stored_sha256", "content_sha256"), DIGESTS),
    **dict.fromkeys(("dtype", "codec", "kind", "role", "encoding", "layout", "format", "model_type"), WORDS),
    **dict.fromkeys(("shape", "logical_shape", "data_offsets", "weight_block_size", "layers", "experts"), SHAPES),
}
KEYS = (
    *_BY_KEY, "size", "offset", "tensors", "chunks", "unpacked_size", "content_size", "layer", "expert", "version",
)  # fmt: skip


def kind_of(key: object, value: object) -> tuple[Any, ...] | None:
    """The values of the kind that stands at a key, hostile and good ones; None when nothing shows the kind."""
    if isinstance(value, str) and value.endswith(".safetensors"):
        return PATHS
    if isinstance(value, int):
        return NUMBERS
    return _BY_KEY.get(key)


def choose(chance: Random, pool: tuple[Any, ...]) -> Any:
    """A value of a kind; a copy, as later mutations change it."""
    if pool is SHAPES and chance.random() < 0.002:
        # Whoever multiplies these one by one takes seconds.
        return [2**62 - 1] * 40_000
    return copy.deepcopy(chance.choice(pool))


def any_value(chance: Random, key: object) -> Any:
    """A value that does not belong at a key; half of them are of the type that is looked for there."""
    if key in _BY_KEY and chance.random() < 0.6:
        return choose(chance, _BY_KEY[key])
    kind = chance.random()
    if kind < 0.5:
        return chance.choice(NUMBERS)
    if kind < 0.75:
        return chance.choice(STRINGS)
    if kind < 0.85:
        return copy.deepcopy(chance.choice((*SHAPES, *PATHS)))
    if kind < 0.9:
        return _nested(chance)
    return chance.choice((None, [], {}, [None], {"a": None}, [[]], {"": ""}))


def _nested(chance: Random) -> str:
    depth = chance.choice((3, 30, 300, chance.randint(930, 999), 30_000))
    before, inside, after = chance.choice((("[", "", "]"), ('{"a":', "1", "}")))
    return _raw(before * depth + inside + after * depth)


def is_json(text: bytes) -> bool:
    """Whether a text is JSON by its grammar (RFC 8259); nesting that Python's parser cannot follow counts as no."""
    try:
        text = text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    try:
        json.loads(text, parse_constant=_refuse)
    except RecursionError:
        return False
    except ValueError as error:
        # A number of more digits than Python takes is still JSON.
        return "integer string conversion" in str(error) and _is_json_of_long_numbers(text)
    return True


def _is_json_of_long_numbers(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse, parse_int=len)
    except (RecursionError, ValueError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)
