"""One flipped bit anywhere is found and named: file, tensor, byte range."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

import manifests
from manifests import digest, validate
from manifests.errors import ManifestError, ToolkitError
from reshard import blocks
from reshard import verify as verify_module
from reshard.blocks import Reader
from reshard.progress import Progress
from reshard.verify import Damage, find_unnamed, verify, verify_against


def look(root: Path, jobs: int = 2) -> list[Damage]:
    with Progress(0, label="", quiet=True) as progress:
        return verify(manifests.open(root), jobs=jobs, progress=progress)


def compare(root: Path, source: Path) -> list[Damage]:
    with Progress(0, label="", quiet=True) as progress:
        return verify_against(manifests.open(root), source, jobs=2, progress=progress)


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def test_an_undamaged_folder(v3_resharded: Path, v3_folder: Path) -> None:
    assert look(v3_resharded) == []
    assert compare(v3_resharded, v3_folder) == []


def test_every_byte_is_read_once(v3_resharded: Path) -> None:
    with Progress(0, label="", quiet=True) as progress:
        verify(manifests.open(v3_resharded), jobs=3, progress=progress)
        files = [path for path in v3_resharded.rglob("*") if path.is_file() and path.name != "manifest.json"]
        # Progress counts payloads, headers and documents alike.
        assert progress.bytes == sum(path.stat().st_size for path in files)


def regions(root: Path) -> Iterator[tuple[str, int, Damage]]:
    """In every file and every document, a byte of each part: first, last, and one between."""
    manifest = manifests.open(root).manifest
    for number, file in enumerate(manifest.files):
        if number % 6 and file.kind == "expert":
            continue  # they are all alike
        header = Damage(path=file.path, tensor=None, begin=0, end=file.header_size, message="its header is damaged")
        for position in (0, 8, file.header_size - 1):
            yield file.path, position, header
        for tensor in file.tensors:
            end = tensor.offset + tensor.size
            damage = Damage(
                path=file.path, tensor=tensor.name, begin=tensor.offset, end=end, message="its bytes are damaged"
            )
            if tensor.size:
                yield file.path, (tensor.offset, end - 1, tensor.offset + tensor.size // 2)[number % 3], damage
    for document in manifest.documents:
        damage = Damage(path=document.path, tensor=None, begin=0, end=document.size, message="its bytes are damaged")
        if document.size and (document.role != "source_header" or document.path.endswith("7.zst")):
            yield document.path, document.size - 1, damage


def test_one_flipped_bit_anywhere_is_named(resharded_copy: Path) -> None:
    """All at once, each in a place of its own: what is found must be exactly what was done."""
    done = {}
    for number, (path, position, damage) in enumerate(regions(resharded_copy)):
        if (damage.path, damage.tensor, damage.begin) not in done:
            flip(resharded_copy / path, position, number % 8)
            done[damage.path, damage.tensor, damage.begin] = damage
    assert len(done) > 100
    assert look(resharded_copy) == sorted(done.values(), key=look(resharded_copy).index)
    assert look(resharded_copy, jobs=1) == look(resharded_copy, jobs=4)


@pytest.mark.parametrize("position", [0, 7, 8, 100, 4095])
def test_a_header_is_checked_to_its_last_blank(resharded_copy: Path, position: int) -> None:
    flip(resharded_copy / "layers/2/experts/03.safetensors", position, 3)
    assert [(d.path, d.tensor, d.begin, d.end) for d in look(resharded_copy)] == [
        ("layers/2/experts/03.safetensors", None, 0, 4096)
    ]


def test_large_tensors_are_named_to_the_chunk(
    v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (digest, validate, verify_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    out = reshard_folder(v2_folder, tmp_path / "out")
    location = manifests.open(out).find("model.embed_tokens.weight")
    assert location is not None
    assert location.size == 2400
    flip(Path(location.place), location.offset + 1999)
    flip(Path(location.place), location.offset + 2399)
    assert [(d.tensor, d.begin - location.offset, d.end - location.offset) for d in look(out)] == [
        (location.name, 1000, 2000),
        (location.name, 2000, 2400),
    ]


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "path", ["layers/1/experts/05.safetensors", "config.json", "source/index.json.zst", "empty.txt"]
)
@pytest.mark.parametrize("how", ["gone", "a FIFO", "a folder", "a link that leaves"])
def test_whole_files(resharded_copy: Path, tmp_path: Path, path: str, how: str, deadline: None) -> None:
    target = resharded_copy / path
    size = target.stat().st_size
    actions: dict[str, Callable[[], Any]] = {
        "gone": target.unlink,
        "a FIFO": lambda: replace_by_fifo(target),
        "a folder": lambda: (target.unlink(), target.mkdir()),
        "a link that leaves": lambda: (shutil.move(target, tmp_path / "x"), target.symlink_to(tmp_path / "x")),
    }
    actions[how]()
    damage = look(resharded_copy)
    assert [(d.path, d.tensor, d.begin, d.end) for d in damage] == [(path, None, 0, size)]
    assert str(target) not in damage[0].message  # it stands beside it


@pytest.mark.parametrize("path", ["layers/1/experts/05.safetensors", "config.json", "source/index.json.zst"])
@pytest.mark.parametrize("left", ["all but a byte", "half", "a byte of a header", "nothing"])
def test_a_file_that_was_cut_is_right_as_far_as_it_goes(resharded_copy: Path, path: str, left: str) -> None:
    manifest = manifests.load(resharded_copy)
    size = (resharded_copy / path).stat().st_size
    kept = {"all but a byte": size - 1, "half": size // 2, "a byte of a header": 1, "nothing": 0}[left]
    os.truncate(resharded_copy / path, kept)
    entry = next((file for file in manifest.files if file.path == path), None)
    parts = [(None, 0, entry.header_size if entry else size)]
    parts += [(t.name, t.offset, t.offset + t.size) for t in (entry.tensors if entry else ())]
    damage = look(resharded_copy)
    assert [(d.path, d.tensor, d.begin, d.end) for d in damage] == [(path, *part) for part in parts if part[2] > kept]
    assert {d.message for d in damage} == {f"the file has {kept} bytes, the manifest says {size}"}


@pytest.mark.parametrize(
    "path", ["layers/1/experts/05.safetensors", "config.json", "source/index.json.zst", "empty.txt"]
)
def test_a_file_that_grew_is_right_up_to_its_end(resharded_copy: Path, path: str) -> None:
    size = (resharded_copy / path).stat().st_size
    os.truncate(resharded_copy / path, size + 5000)
    assert look(resharded_copy) == [
        Damage(
            path=path, tensor=None, begin=size, end=size + 5000,
            message=f"the file has {size + 5000} bytes, the manifest says {size}",
        )
    ]  # fmt: skip
    if size:
        flip(resharded_copy / path, size - 1)
        damage = look(resharded_copy)
        assert [(d.path, d.end) for d in damage] == [(path, size), (path, size + 5000)]


def test_a_tensor_in_many_blocks(resharded_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies across two blocks, and what comes behind it in the second."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8192)
    assert look(resharded_copy) == []
    file = next(file for file in manifests.load(resharded_copy).files if file.path == "layers/1/dense.safetensors")
    tensors = [tensor for tensor in file.tensors if tensor.offset // 8192 < (tensor.offset + tensor.size - 1) // 8192]
    assert len(tensors) > 3
    for tensor in tensors[1::2]:
        flip(resharded_copy / file.path, tensor.offset + tensor.size - 1)
    assert [d.tensor for d in look(resharded_copy)] == [tensor.name for tensor in tensors[1::2]]


def test_findings_come_in_the_order_of_the_manifest(resharded_copy: Path) -> None:
    """However many look, and whoever is done first: the large files take longest."""
    manifest = manifests.load(resharded_copy)
    entries = [*manifest.files, *manifest.documents]
    for entry in entries:
        os.truncate(resharded_copy / entry.path, entry.size + 1)
    for jobs in (1, 4):
        assert [d.path for d in look(resharded_copy, jobs)] == [entry.path for entry in entries]


def bad_sector(monkeypatch: pytest.MonkeyPatch, path: Path, sector: range) -> None:
    """A disk that cannot read some bytes of a file, nor anything that is asked for together with them."""
    read = Reader.read

    def fail(self: Reader, buffer: memoryview, begin: int, end: int) -> tuple[memoryview, bool]:
        if self._path == path and begin < sector.stop and sector.start < end:
            raise ToolkitError(f"{path}: cannot be read at byte {begin}: Input/output error")
        return read(self, buffer, begin, end)

    monkeypatch.setattr(Reader, "read", fail)


def test_a_bad_sector_is_damage_of_the_tensors_that_lie_on_it(
    resharded_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = next(file for file in manifests.load(resharded_copy).files if file.path == "layers/2/dense.safetensors")
    second, third = file.tensors[1:3]
    bad_sector(monkeypatch, resharded_copy / file.path, range(third.offset - 1, third.offset + 1))
    damage = look(resharded_copy)
    assert [(d.tensor, d.begin, d.end) for d in damage] == [
        (tensor.name, tensor.offset, tensor.offset + tensor.size) for tensor in (second, third)
    ]
    assert all("Input/output error" in d.message for d in damage)


def test_files_that_the_manifest_does_not_name_are_no_damage(resharded_copy: Path, v3_resharded: Path) -> None:
    assert find_unnamed(manifests.open(v3_resharded)) == []
    for path in ("a note.txt", "layers/2/dense.safetensors.partial", "model/new/x"):
        (resharded_copy / path).parent.mkdir(exist_ok=True)
        (resharded_copy / path).touch()
    assert look(resharded_copy) == []
    assert find_unnamed(manifests.open(resharded_copy)) == [
        "a note.txt", "layers/2/dense.safetensors.partial", "model/new/x",
    ]  # fmt: skip


def test_a_failing_disk_is_damage_of_the_file_it_fails_in(resharded_copy: Path, fail_call: Callable[..., Any]) -> None:
    checkpoint = manifests.open(resharded_copy)
    fail_call("preadv", 60)
    with Progress(0, label="", quiet=True) as progress:
        damage = verify(checkpoint, jobs=1, progress=progress)
    files = len(checkpoint.manifest.files) + len([d for d in checkpoint.manifest.documents if d.size])
    assert 0 < len(damage) < files
    assert all("Input/output error" in d.message for d in damage)


def test_against_another_source(v3_resharded: Path, v3_copy: Path) -> None:
    names = sorted(path.name for path in v3_copy.glob("model-*.safetensors"))
    flip(v3_copy / names[3], (v3_copy / names[3]).stat().st_size - 1)
    flip(v3_copy / "tokenizer.json", 5)
    flip(v3_copy / "model.safetensors.index.json", 3)
    (v3_copy / "LICENSE").unlink()
    (v3_copy / names[9]).unlink()
    os.truncate(v3_copy / names[7], 10)
    damaged = {names[3], names[7], names[9], "tokenizer.json", "LICENSE", "model.safetensors.index.json"}
    found = compare(v3_resharded, v3_copy)
    assert {d.path for d in found} == damaged
    assert [d.message for d in found if d.path in (names[9], "LICENSE")] == ["no such file"] * 2
    assert len(found) == len(damaged)


def test_a_plain_folder_cannot_be_verified(v3_folder: Path) -> None:
    with pytest.raises(ManifestError, match="not a resharded checkpoint"):
        look(v3_folder)


def test_a_file_that_is_stored_compressed(resharded_copy: Path) -> None:
    """Other tools may have packed it, as FORMAT.md allows; its stored bytes prove the others."""
    manifest = manifests.load(resharded_copy)
    number, entry = next((n, f) for n, f in enumerate(manifest.files) if f.kind == "expert")
    plain = resharded_copy / entry.path
    packed = zstandard.ZstdCompressor().compress(plain.read_bytes())
    plain.unlink()
    (resharded_copy / f"{entry.path}.zst").write_bytes(packed)
    files = list(manifest.files)
    files[number] = dataclasses.replace(
        entry,
        path=f"{entry.path}.zst",
        size=len(packed),
        codec="zstd",
        stored_sha256=hashlib.sha256(packed).hexdigest(),
    )
    manifests.save(dataclasses.replace(manifest, files=tuple(files)), resharded_copy)
    assert look(resharded_copy) == []
    flip(resharded_copy / f"{entry.path}.zst", len(packed) // 2)
    assert [(d.path, d.tensor, d.begin, d.end) for d in look(resharded_copy)] == [
        (f"{entry.path}.zst", None, 0, len(packed))
    ]
