"""Mutations of documents and of bytes, by chance from a seed.

Structure: the tree of a valid document is changed with what hostile or broken writers write, and stays JSON (most of
it: a few numbers that are none are among the values). Bytes: bits flipped, ranges cut, doubled, moved, overwritten.
This file knows trees and bytes; `inputs` knows which documents there are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

import hostile

Slot = tuple[Any, Any]


def _slots(tree: Any) -> list[Slot]:
    """Every place of a tree that holds a value: its container and its key there."""
    found: list[Slot] = []
    pending = [tree]
    while pending:
        container = pending.pop()
        for key in container if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], dict | list):
                pending.append(container[key])
    return found


def _replace(chance: Random, slots: list[Slot]) -> None:
    container, key = chance.choice(slots)
    container[key] = hostile.any_value(chance, key)


def _replace_like(chance: Random, slots: list[Slot]) -> None:
    """Replace a value by another of its kind: a path by a path, a digest by a digest, a shape by a shape."""
    by_kind: dict[int, list[Slot]] = {}
    pools = {}
    for container, key in slots:
        if (pool := hostile.kind_of(key, container[key])) is not None:
            pools[id(pool)] = pool
            by_kind.setdefault(id(pool), []).append((container, key))
    if pools:
        # By kind first: numbers are many, paths are few.
        kind = chance.choice(list(pools))
        container, key = chance.choice(by_kind[kind])
        container[key] = hostile.choose(chance, pools[kind])


def _nudge(chance: Random, slots: list[Slot]) -> None:
    """Change a number a little, or by much: holes, overlaps, shapes that overflow."""
    numbers = [(c, k) for c, k in slots if type(c[k]) is int]
    container, key = chance.choice(numbers or slots)
    change = chance.choice((-1, 1, 2, -4, 8, 4096, -4096, 2**62))
    container[key] = container[key] + change if numbers else change


def _delete(chance: Random, slots: list[Slot]) -> None:
    container, key = chance.choice(slots)
    del container[key]


def _rename(chance: Random, slots: list[Slot]) -> None:
    container, key = chance.choice([slot for slot in slots if isinstance(slot[0], dict)] or slots)
    if isinstance(container, dict):
        other = chance.choice((*hostile.KEYS, *hostile.STRINGS, key.upper(), f"{key} ", chance.choice(list(container))))
        container[other] = container.pop(key)


def _repeat_key(chance: Random, slots: list[Slot]) -> None:
    """The same key twice, which only raw JSON can hold."""
    container, key = chance.choice([slot for slot in slots if isinstance(slot[0], dict)] or slots)
    if isinstance(container, dict):
        container[f"{key}{hostile.SAME}{chance.randint(0, 9)}"] = chance.choice(
            (container[key], hostile.any_value(chance, key))
        )


def _add_key(chance: Random, slots: list[Slot]) -> None:
    container, _ = chance.choice([slot for slot in slots if isinstance(slot[0], dict)] or slots)
    if isinstance(container, dict):
        key = chance.choice((*hostile.KEYS, *hostile.STRINGS))
        container[key] = hostile.any_value(chance, key)


def _add_element(chance: Random, slots: list[Slot]) -> None:
    lists = [c[k] for c, k in slots if isinstance(c[k], list)]
    if lists:
        chosen = chance.choice(lists)
        chosen.insert(
            chance.randint(0, len(chosen)), copy.deepcopy(chance.choice((*chosen, hostile.any_value(chance, None))))
        )


def _swap(chance: Random, slots: list[Slot]) -> None:
    # Of one container: swapping a part with what holds it would tie a knot.
    container, key = chance.choice(slots)
    other = chance.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]


def _graft(chance: Random, slots: list[Slot]) -> None:
    """Put a copy of one part in the place of another."""
    (container, key), (giver, other) = chance.choice(slots), chance.choice(slots)
    container[key] = json.loads(json.dumps(giver[other]))


def _wrap(chance: Random, slots: list[Slot]) -> None:
    """Put a value into another one, take one out of it, or write it as a text."""
    container, key = chance.choice(slots)
    value = container[key]
    inside = next(iter(value), 0) if isinstance(value, dict | list | str) else float(value or 0)
    container[key] = chance.choice(([value], {"a": value}, json.dumps(value), inside))


def _shuffle(chance: Random, slots: list[Slot]) -> None:
    """Another order of a list."""
    lists = [c[k] for c, k in slots if isinstance(c[k], list) and len(c[k]) > 1]
    if lists:
        chance.shuffle(chance.choice(lists))


_STRUCTURAL: tuple[Callable[[Random, list[Slot]], None], ...] = (
    *(_replace, _replace, _replace_like, _replace_like, _nudge, _nudge, _delete, _rename, _repeat_key, _add_key),
    *(_add_element, _swap, _graft, _wrap, _shuffle),
)


def mutate_tree(chance: Random, tree: Any) -> list[str]:
    """Change a tree in place, one to three times; return what was done."""
    trail = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        slots = _slots(tree)
        if not slots:
            break
        step = chance.choice(_STRUCTURAL)
        step(chance, slots)
        trail.append(step.__name__.strip("_"))
    return trail


def respell(chance: Random, tree: Any) -> tuple[bytes, list[str]]:
    """The same document in other words: order of keys, blanks, escapes. It must stay as good as it was."""
    if isinstance(tree, dict):
        keys = list(tree)
        chance.shuffle(keys)
        tree = {key: tree[key] for key in keys}
    text = hostile.dump(tree, ascii_only=chance.random() < 0.5, indent=chance.choice((None, 0, 1)))
    if chance.random() < 0.5:
        # No number, literal or escape has this letter.
        text = text.replace(b"p", b"\\u0070")
    return text, ["respell"]


_PIECES = (
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"1e999", b"-",
    b"null", b"NaN", b"\\u0000", b"\\ud800", b"9" * 30, b" " * 9, b"[[[[", b"/*", b"//", b"'", b"\xc0\x80", b"\r\n",
)  # fmt: skip


def mutate_bytes(chance: Random, data: bytes) -> tuple[bytes, list[str]]:
    """Damage that knows nothing of structure."""
    trail = []
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        kind = chance.choice(("flip", "flip", "digit", "insert", "delete", "double", "cut", "move", "noise"))
        at = chance.randrange(len(raw)) if raw else 0
        end = at + chance.choice((1, 1, 2, 8, 64, 500))
        trail.append(kind)
        if kind == "flip" and raw:
            raw[at] ^= 1 << chance.randrange(8)
        elif kind == "digit":
            places = [place for place, byte in enumerate(raw) if 0x30 <= byte <= 0x39]
            if places:
                raw[chance.choice(places)] = chance.randrange(0x30, 0x3A)
        elif kind == "insert":
            raw[at:at] = chance.choice(_PIECES)
        elif kind == "delete":
            del raw[at:end]
        elif kind == "double":
            raw[at:at] = raw[at:end]
        elif kind == "cut":
            del raw[at:]
        elif kind == "move":
            piece = raw[at:end]
            del raw[at:end]
            to = chance.randint(0, len(raw))
            raw[to:to] = piece
        elif kind == "noise":
            raw[at:end] = chance.randbytes(min(end, len(raw)) - at)
    return bytes(raw), trail


def mutate_document(chance: Random, tree: Any, fit: Callable[[Any], None] | None = None) -> tuple[bytes, list[str]]:
    """A document's bytes after a mutation of either kind; fit mends a tree after a change of its structure."""
    kind = chance.random()
    if kind < 0.2:
        return mutate_bytes(chance, hostile.dump(tree))
    if kind < 0.28:
        return respell(chance, tree)
    trail = mutate_tree(chance, tree)
    if fit is not None and chance.random() < 0.6:
        fit(tree)
        trail.append("fit")
    return hostile.dump(tree, ascii_only=chance.random() < 0.8), trail
