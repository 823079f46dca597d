"""The manifest on disk: canonical, self-proving, atomic, durable."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests import storage
from manifests.errors import ManifestError, SourceNotFoundError
from manifests.paths import Kind
from manifests.schema import FileEntry, Manifest, TensorEntry, to_document
from manifests.storage import MAX_MANIFEST_BYTES, decode, encode, load, save, write_atomic
from manifests.validate import parse


def encode_at_once(manifest: Manifest) -> bytes:
    """The canonical bytes as FORMAT.md defines them, without a thought of memory."""
    document = to_document(manifest) | {"manifest_sha256": "0" * 64}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    return text.replace('"manifest_sha256":"' + "0" * 64, f'"manifest_sha256":"{digest}').encode("ascii")


def many_files(count: int) -> Iterator[FileEntry]:
    """Entries of two tensors each, made one by one."""
    for number in range(count):
        tensors = tuple(
            TensorEntry(
                name=f"model.layers.3.mlp.experts.{number}.{part}",
                dtype="U8",
                shape=(5,),
                offset=4096 + 5 * place,
                size=5,
                digest=hashlib.sha256(f"{number} {part}".encode()).hexdigest(),
                logical_shape=(5,),
                source_name="\u6a21" * (number % 3 + 1),
            )
            for place, part in enumerate(("up_proj.weight", "up_proj.bias"))
        )
        yield FileEntry(
            path=f"layers/3/experts/{number:04d}.safetensors",
            kind=Kind.EXPERT,
            layer=3,
            expert=number,
            size=4106,
            unpacked_size=4106,
            header_size=4096,
            header_sha256="1" * 64,
            digest="2" * 64,
            tensors=tensors,
        )


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


@pytest.mark.parametrize("write_bytes", [1, 64, 700, 1 << 20])
@pytest.mark.parametrize("files", [0, 1, 2, 7])
def test_made_in_parts_the_bytes_are_those_made_at_once(
    good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_bytes: int, files: int
) -> None:
    monkeypatch.setattr(storage, "WRITE_BYTES", write_bytes)
    whole = parse(good)
    for manifest in (
        whole,
        dataclasses.replace(whole, files=whole.files[:files]),
        dataclasses.replace(whole, files=tuple(many_files(files))),
        Manifest(layout="in_place", files=whole.files[:files]),
    ):
        expected = encode_at_once(manifest)
        assert encode(manifest) == expected
        save(manifest, tmp_path)
        assert (tmp_path / "manifest.json").read_bytes() == expected
        save(dataclasses.replace(manifest, files=()), tmp_path, files=iter(manifest.files))
        assert (tmp_path / "manifest.json").read_bytes() == expected


def test_files_given_one_by_one_are_not_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WRITE_BYTES", 1 << 14)
    manifest = Manifest(layout="in_place", files=())
    peaks = []
    # Several times: the interpreter's own tables, such as that of interned texts, grow once in a while.
    for _ in range(3):
        tracemalloc.start()
        try:
            save(manifest, tmp_path, files=many_files(3000))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert (tmp_path / "manifest.json").stat().st_size > 1_500_000
    assert min(peaks) < 200_000


def test_reading_never_holds_the_document_and_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Manifest(layout="in_place", files=tuple(many_files(1000))), tmp_path)
    size = (tmp_path / "manifest.json").stat().st_size
    held, kept, grown = 0, [], []

    def watched(document: Any, **options: Any) -> Manifest:
        nonlocal held
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        return parse(document, **options)

    monkeypatch.setattr(storage, "parse", watched)
    for _ in range(3):  # see above
        tracemalloc.start()
        try:
            manifest = load(tmp_path)
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(manifest.files) == 1000
        kept.append(now)
        grown.append(peak - held)
    assert min(kept) < 2.2 * size
    assert min(grown) < 0.3 * size


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


def write_by_either(path: Path) -> list[Callable[[], None]]:
    """Both ways to put something new at path."""
    manifest = Manifest(layout="in_place", files=tuple(many_files(3)))
    return [lambda: write_atomic(path, b"new"), lambda: save(manifest, path.parent)]


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "rename", "close"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, way: int
) -> None:
    """Each call of each kind fails once."""
    monkeypatch.setattr(storage, "WRITE_BYTES", 1000)
    path = tmp_path / "manifest.json"
    real = getattr(os, call)
    done, failing = 0, 0

    def count_and_fail(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == failing:
            if call == "close":
                real(*arguments)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, call, count_and_fail)
    write_by_either(path)[way]()
    # The last ones are of the folder, when the new file has its name.
    calls = done - (call in ("open", "fsync", "close"))
    assert calls >= (3 if call == "pwrite" and way else 1)
    for failing in range(1, calls + 1):  # noqa: B007  # read by the function above
        done = 0
        path.write_bytes(b"old")
        with pytest.raises(OSError, match="Input/output error"):
            write_by_either(path)[way]()
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["manifest.json"]


def test_the_first_failure_is_told_even_if_cleaning_up_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(code: int) -> Callable[..., None]:
        def call(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        return call

    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    monkeypatch.setattr(os, "unlink", fail(errno.EROFS))
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "x", b"1")


def test_an_entry_that_cannot_be_made_leaves_no_manifest(tmp_path: Path) -> None:
    def break_off() -> Iterator[FileEntry]:
        yield from many_files(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(Manifest(layout="in_place", files=()), tmp_path, files=break_off())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("way", [0, 1])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: int) -> None:
    path = tmp_path / "manifest.json"
    write_by_either(path)[way]()
    expected = path.read_bytes()
    path.unlink()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:7], offset))
    write_by_either(path)[way]()
    assert path.read_bytes() == expected


def test_what_an_earlier_crash_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.partial").write_bytes(b"longer than what comes")
    write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_two_manifests_that_differ_anywhere_have_different_digests(small: Manifest) -> None:
    other = dataclasses.replace(small, model=dataclasses.replace(small.model, num_experts_per_tok=9))
    assert json.loads(encode(small))["manifest_sha256"] != json.loads(encode(other))["manifest_sha256"]
