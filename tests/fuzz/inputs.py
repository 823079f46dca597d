"""The inputs of the fuzzer, by number: the same seed and number give the same bytes on every machine.

A valid document is mutated, and then the outer checks (length field, offsets, digests of digests, manifest_sha256, the
chain of a journal) are mostly fitted to the change, so that the checks behind them are reached. This file makes bytes;
`targets` knows what must happen to them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import documents
import gguf_inputs
import zstandard
from hostile import ESCAPES, PATHS, STRINGS, dump
from mutate import mutate_bytes, mutate_document, mutate_tree, respell

FOLDERS = 6
WEIGHTS = {
    "header": 32,
    "header_file": 6,
    "manifest": 30,
    "folder": 14,
    "config": 5,
    "journal": 4,
    "archive": 4,
    "name": 3,
    "path": 2,
    "gguf": 10,
    "gguf_file": 6,
}
"""How often an input goes to each target. The last five, from archives on, are no JSON documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input.

    Attributes:
        number: Its number; with the seed, all that is needed to make it again.
        target: The name of the function of `targets` that takes it.
        data: The bytes.
        json: The part of them that is meant to be JSON; None for targets that do not read JSON.
        extra: What else the target needs, such as the claimed size of a file.
        trail: What was done to a valid document.
    """

    number: int
    target: str
    data: bytes
    json: bytes | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    trail: tuple[str, ...] = ()


def make(seed: int, number: int) -> Input:
    """The input of this number."""
    chance = Random(f"{seed} {number}")
    target = chance.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
    return _MAKERS[target](chance, number, target)


def _make_header(chance: Random, number: int, target: str) -> Input:
    tree = documents.header(chance)
    text, trail = mutate_document(chance, tree, documents.fit_header)
    text += b" " * chance.choice((0, 0, 1, 7))
    raw, payload = documents.frame_header(text), documents.payload_size(tree)
    size = len(raw) + payload
    kind = chance.random()
    if kind < 0.05:
        raw, added = mutate_bytes(chance, raw)
        trail += [*added, "in the frame"]
    elif kind < 0.1:
        length = chance.choice((0, 1, len(text) - 1, len(text) + 1, 10**8, 10**8 + 1, 2**63, 2**64 - 1, payload))
        raw = struct.pack("<Q", max(0, length) % 2**64) + text
        trail.append("length")
    elif kind < 0.17:
        size = max(0, size + chance.choice((-1, 1, 8, -size, 2**62)))
        trail.append("size")
    return Input(number=number, target=target, data=raw, json=raw[8:], extra={"size": size}, trail=tuple(trail))


def _make_manifest(chance: Random, number: int, target: str) -> Input:
    tree = documents.manifest(chance)
    kind = chance.random()
    if kind < 0.15:
        text, trail = mutate_bytes(chance, dump(tree, sort=True) + b"\n")
    elif kind < 0.2:
        text, trail = respell(chance, tree)
    else:
        trail = mutate_tree(chance, tree)
        if chance.random() < 0.6:
            documents.fit_manifest(tree)
            trail.append("fit")
        text = dump(tree, sort=chance.random() < 0.9) + b"\n"
    if chance.random() < 0.92:
        text = documents.seal(text)
        trail.append("seal")
    return Input(number=number, target=target, data=text, json=text, trail=tuple(trail))


_FOLDERS = [documents.folder(number) for number in range(FOLDERS)]


def _make_folder(chance: Random, number: int, target: str) -> Input:
    """One file of a small checkpoint changed; its index more often than the others."""
    chosen = chance.randrange(FOLDERS)
    files = _FOLDERS[chosen]
    name = chance.choice([*files, *(["model.safetensors.index.json"] * 3 if chosen else [])])
    data, payload = files[name]
    is_shard = name.endswith(".safetensors")
    tree = json.loads(data[8:] if is_shard else data)
    if "weight_map" in tree and chance.random() < 0.15:
        for moved in chance.sample(sorted(tree["weight_map"]), chance.choice((1, 2))):
            tree["weight_map"][moved] = chance.choice(ESCAPES)
        text, trail = dump(tree), ["escape"]
    else:
        text, trail = mutate_document(chance, tree, documents.fit_header if is_shard else None)
    if is_shard:
        data, payload = documents.frame_header(text), documents.payload_size(tree)
        payload = max(0, payload + chance.choice((0, 0, 0, 0, 0, 0, 0, 0, 1, -1)))
    else:
        data = text
    extra = {"folder": chosen, "file": name, "size": len(data) + payload}
    return Input(number=number, target=target, data=data, json=text, extra=extra, trail=tuple(trail))


def _make_gguf(chance: Random, number: int, target: str) -> Input:
    data, payload, trail = gguf_inputs.change(chance, gguf_inputs.document(chance))
    extra = {"size": len(data) + payload, "file": "model.gguf"}
    return Input(number=number, target=target, data=data, extra=extra, trail=tuple(trail))


def _make_gguf_file(chance: Random, number: int, target: str) -> Input:
    """A whole model, or one file of a split one changed."""
    if chance.random() < 0.5:
        return _make_gguf(chance, number, target)
    chosen = chance.randrange(2)
    data, payload, trail = gguf_inputs.change(chance, copy.deepcopy(gguf_inputs.split_set()[chosen]))
    extra = {"size": len(data) + payload, "file": gguf_inputs.PARTS[chosen]}
    return Input(number=number, target=target, data=data, extra=extra, trail=tuple(trail))


def _make_config(chance: Random, number: int, target: str) -> Input:
    text, trail = mutate_document(chance, documents.config(chance))
    return Input(number=number, target=target, data=text, json=text, trail=tuple(trail))


def _make_journal(chance: Random, number: int, target: str) -> Input:
    """A journal with one record changed and its chain fitted, or with damage anywhere."""
    records = documents.journal(chance)
    changed = chance.randrange(len(records))
    texts = [dump(record, sort=True) for record in records]
    texts[changed], trail = mutate_document(chance, records[changed])
    # The chain is made of the canonical form, and so are the lines of whoever wrote it.
    with contextlib.suppress(ValueError, RecursionError):
        canonical = json.dumps(json.loads(texts[changed]), sort_keys=True, separators=(",", ":")).encode()
        texts[changed] = canonical if chance.random() < 0.8 else texts[changed]
    data = documents.chain(texts)
    if chance.random() < 0.4:
        data, added = mutate_bytes(chance, data)
        trail += added
    return Input(number=number, target=target, data=data, json=texts[changed], trail=tuple(trail))


def _make_archive(chance: Random, number: int, target: str) -> Input:
    """A saved header in a zstd frame that was damaged or crafted."""
    text = documents.frame_header(dump(documents.header(chance)))
    size = len(text)
    write = zstandard.ZstdCompressor(
        level=chance.choice((1, 19)),
        write_checksum=chance.random() < 0.5,
        write_content_size=chance.random() < 0.9,
    ).compress
    kind = chance.random()
    data, trail = write(text), []
    if kind < 0.5:
        data, trail = mutate_bytes(chance, data)
    elif kind < 0.6:
        claimed = chance.choice((0, 1, size + 1, 1000, 200_000))
        data, size, trail = _crafted(chance, claimed), claimed, ["crafted"]
    elif kind < 0.605:
        # The largest that is let through, from a few bytes for each 128 KiB.
        data, size, trail = _bomb(100_000_008), 100_000_008, ["bomb"]
    elif kind < 0.7:
        data, trail = data + chance.choice((data, b"x", b"\x50\x2a\x4d\x18\x01\x00\x00\x00x")), ["more"]
    elif kind < 0.75:
        data, trail = b"\x50\x2a\x4d\x18\x01\x00\x00\x00x" + data, ["skippable"]
    else:
        data, trail = write(mutate_bytes(chance, text)[0]), ["inside"]
    if chance.random() < 0.3:
        size = max(0, size + chance.choice((-1, 1, -size, 2**31, 2**62, 10**8)))
        trail = [*trail, "size"]
    return Input(number=number, target=target, data=data, extra={"size": size}, trail=tuple(trail))


def _crafted(chance: Random, claimed: int) -> bytes:
    """A frame by hand: claimed size, a window of up to 2 TB, and blocks that may not fit either."""
    flags = chance.choice((0x80, 0xA0, 0x84, 0x83, 0x98))
    window = b"" if flags & 0x20 else bytes([chance.randrange(256)])
    dictionary = b"\x01\x00\x00\x00"[: (0, 1, 2, 4)[flags & 3]]
    blocks = b"".join(
        (chance.choice((0, 0, 1)) | kind << 1 | chance.choice((1, 100, claimed, 131_072)) << 3 & 0xFFFFF8).to_bytes(
            3, "little"
        )
        + (b"x" * chance.choice((1, 100)) if kind != 1 else b"x")
        for kind in chance.choices((0, 1, 1, 2, 3), k=chance.randint(1, 4))
    )
    return b"\x28\xb5\x2f\xfd" + bytes([flags]) + window + dictionary + struct.pack("<I", claimed) + blocks


def _bomb(size: int) -> bytes:
    """A good frame of one byte repeated."""
    blocks, rest = [], size
    while rest:
        part = min(rest, 131_072)
        rest -= part
        blocks.append((int(rest == 0) | 1 << 1 | part << 3).to_bytes(3, "little") + b" ")
    return b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", size) + b"".join(blocks)


def _make_text(chance: Random, number: int, target: str) -> Input:
    """A tensor name or a path, good ones with a part exchanged."""
    numbers = ("0", "7", "03", "255", "9999", "10000", "-1", "", "\uff11", "\u00b2", "1_0", "+1", " 1", "1\n")
    if target == "name":
        text = chance.choice((*documents.NAMES, *STRINGS)).replace("{0}", chance.choice(numbers))
    else:
        text = chance.choice((*PATHS, *STRINGS, "layers/{0}/dense.safetensors", "layers/{0}/experts/{1}.safetensors"))
        text = text.replace("{0}", chance.choice(numbers))
    parts = text.replace("{1}", chance.choice(numbers)).split(separator := chance.choice((".", "/")))
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(parts))
        piece = chance.choice((*STRINGS, *numbers, "..", "weight", "weight_scale_inv", "model", "experts", "layers"))
        parts[at : at + chance.choice((0, 1))] = [piece, parts[at]][: chance.choice((1, 2))]
    text = separator.join(parts)
    return Input(number=number, target=target, data=text.encode("utf-8", "surrogatepass"), trail=("text",))


_MAKERS: dict[str, Callable[[Random, int, str], Input]] = {
    "header": _make_header,
    "header_file": _make_header,
    "manifest": _make_manifest,
    "folder": _make_folder,
    "config": _make_config,
    "journal": _make_journal,
    "archive": _make_archive,
    "name": _make_text,
    "path": _make_text,
    "gguf": _make_gguf,
    "gguf_file": _make_gguf_file,
}
