"""The manifest on disk: canonical, self-proving, atomic, durable."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import ManifestError, SourceNotFoundError
from manifests.schema import Manifest
from manifests.storage import MAX_MANIFEST_BYTES, decode, encode, load, save, write_atomic
from manifests.validate import parse


@pytest.fixture
def small(good: dict[str, Any]) -> Manifest:
    """A resharded checkpoint of one tensor."""
    good["files"] = good["files"][3:]
    good["documents"] = good["documents"][2:3]
    good["source"]["shards"] = good["source"]["shards"][:1]
    return parse(good)


def test_canonical_bytes(good: dict[str, Any]) -> None:
    good["documents"][0]["path"] = good["documents"][0]["source_name"] = "\u6a21\u578b \U0001f600.txt"
    raw = encode(parse(good))
    document = json.loads(raw)
    assert raw == json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"
    assert raw.count(b"\n") == 1
    shuffled = json.loads(json.dumps(good), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert encode(parse(shuffled)) == raw
    zeroed = raw.replace(document["manifest_sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == document["manifest_sha256"]


def test_there_and_back(good: dict[str, Any], tmp_path: Path) -> None:
    manifest = parse(good)
    assert decode(encode(manifest), what="") == manifest
    save(manifest, tmp_path)
    assert load(tmp_path) == manifest
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_one_flipped_bit_is_refused_wherever_it_is(small: Manifest) -> None:
    raw = encode(small)
    for position in range(len(raw)):
        for bit in (position % 8, (position + 5) % 8):  # all eight would take four times as long and find no more
            damaged = bytearray(raw)
            damaged[position] ^= 1 << bit
            with pytest.raises(ManifestError):
                decode(bytes(damaged), what="x")


def test_every_cut_and_any_addition_is_refused(small: Manifest) -> None:
    raw = encode(small)
    for size in range(len(raw)):
        with pytest.raises(ManifestError):
            decode(raw[:size], what="x")
    for extra in (b"\n", b" ", b"\0", b"{}", raw):
        with pytest.raises(ManifestError):
            decode(raw + extra, what="x")


def test_swapped_bytes_are_refused(good: dict[str, Any]) -> None:
    raw = encode(parse(good))
    chance = random.Random(1)
    for _ in range(200):
        a, b = chance.sample(range(len(raw)), 2)
        damaged = bytearray(raw)
        damaged[a], damaged[b] = damaged[b], damaged[a]
        if damaged != raw:
            with pytest.raises(ManifestError):
                decode(bytes(damaged), what="x")


def test_an_edit_is_refused_even_where_it_is_valid(good: dict[str, Any]) -> None:
    raw = encode(parse(good))
    edited = raw.replace(b'"model_type":"deepseek_v3"', b'"model_type":"deepseek_v2"')
    assert edited != raw
    with pytest.raises(ManifestError, match="damaged or edited"):
        decode(edited, what="x")
    with pytest.raises(ManifestError, match="manifest_sha256"):
        decode(json.dumps(good, sort_keys=True).encode(), what="x")


def test_a_name_that_looks_like_the_digest_fools_nobody(good: dict[str, Any]) -> None:
    good["files"][3]["tensors"][0]["name"] = f'"manifest_sha256":"{"0" * 64}"'
    manifest = parse(good)
    assert decode(encode(manifest), what="") == manifest
    nested = encode(manifest).replace(b'"model":{', b'"model":{"manifest_sha256":"' + b"0" * 64 + b'",')
    with pytest.raises(ManifestError):
        decode(nested, what="x")


def test_what_load_does_not_take(tmp_path: Path, small: Manifest, deadline: None) -> None:
    with pytest.raises(SourceNotFoundError, match=r"has no manifest\.json"):
        load(tmp_path)
    with pytest.raises(SourceNotFoundError):
        load(tmp_path / "absent")
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(SourceNotFoundError):
        load(tmp_path)
    (tmp_path / "manifest.json").rmdir()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(SourceNotFoundError):
        load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    save(small, tmp_path)
    os.truncate(tmp_path / "manifest.json", MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ManifestError, match="larger than"):
        load(tmp_path)


def test_bytes_are_durable_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(f"fsync {path.name}" + (f" of {path.stat().st_size}" if path.is_file() else ""))
        fsync(descriptor)

    def seen_rename(a: Path, b: Path) -> None:
        done.append(f"rename {Path(a).name} {Path(b).name}")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    write_atomic(tmp_path / "x", b"12345")
    assert done == ["fsync x.partial of 5", "rename x.partial x", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_two_manifests_that_differ_anywhere_have_different_digests(small: Manifest) -> None:
    other = dataclasses.replace(small, model=dataclasses.replace(small.model, num_experts_per_tok=9))
    assert json.loads(encode(small))["manifest_sha256"] != json.loads(encode(other))["manifest_sha256"]
