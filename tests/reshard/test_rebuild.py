"""Of a damaged file only what is damaged is made anew; documents and packed files, whatever form the source has."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

import manifests
from manifests import digest, validate
from manifests.errors import ToolkitError
from manifests.schema import FileEntry
from reshard import archive, packing, rebuild
from reshard import verify as verify_module
from reshard.blocks import Reader, Writer
from reshard.progress import Progress
from reshard.rebuild import Repaired
from reshard.repair import UnrepairedError, repair
from reshard.restore import check
from reshard.verify import verify

EXPERT = "layers/2/experts/03.safetensors"
DENSE = "layers/1/dense.safetensors"
Tree = Callable[[Path], dict[str, str]]
Change = Callable[[Path], object]


def quiet(total_bytes: int, *, label: str) -> Progress:
    return Progress(total_bytes, label=label, quiet=True)


def mend(folder: Path, source: Path, jobs: int = 2) -> list[Repaired]:
    return repair(folder, source, jobs=jobs, progress=quiet)


def is_whole(folder: Path) -> bool:
    with quiet(0, label="") as progress:
        return verify(manifests.open(folder), jobs=2, progress=progress) == []


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def file_of(folder: Path, path: str) -> FileEntry:
    return next(file for file in manifests.load(folder).files if file.path == path)


@pytest.fixture(params=["shards", "copy"])
def source(request: pytest.FixtureRequest, v3_folder: Path, v3_resharded: Path) -> Path:
    return {"shards": v3_folder, "copy": v3_resharded}[request.param]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (digest, validate, verify_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1000)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int, int]]:
    """What is read of every file: path, begin, end."""
    found: list[tuple[Path, int, int]] = []
    read = Reader.read

    def record(self: Reader, buffer: memoryview, begin: int, end: int) -> tuple[memoryview, bool]:
        block, is_hole = read(self, buffer, begin, end)
        found.append((self._path, begin, begin + len(block)))
        return block, is_hole

    monkeypatch.setattr(Reader, "read", record)
    return found


def test_only_the_damaged_chunks_are_read_from_the_source(
    v2_folder: Path,
    tmp_path: Path,
    reshard_folder: Callable[..., Path],
    small_chunks: None,
    reads: list[tuple[Path, int, int]],
) -> None:
    out = reshard_folder(v2_folder, tmp_path / "out")
    whole = shutil.copytree(out, tmp_path / "whole")
    here, there = manifests.open(out).find("model.embed_tokens.weight"), None
    assert here is not None
    assert here.size == 2400
    for origin in (v2_folder, whole):
        there = manifests.open(origin).find("model.embed_tokens.weight")
        assert there is not None
        flip(Path(here.place), here.offset + 1000)
        flip(Path(here.place), here.offset + 1999)
        flip(Path(here.place), here.offset + 2399)
        reads.clear()
        assert mend(out, origin) == [Repaired(path=here.file, tensors=("model.embed_tokens.weight",), taken_bytes=1400)]
        assert sum(end - begin for path, begin, end in reads if path == Path(there.place)) == 1400
        assert {path for path, _, _ in reads if path.is_relative_to(origin)} == {Path(there.place)}
        assert is_whole(out)


def test_right_bytes_are_not_asked_of_the_source(
    resharded_copy: Path, v3_copy: Path, v3_resharded: Path, tree: Tree
) -> None:
    """All else of a source may be damaged: the tensor that is needed is right."""
    tensor = file_of(resharded_copy, EXPERT).tensors[2]
    location = manifests.open(v3_copy).find(tensor.name)
    assert location is not None
    for path in v3_copy.glob("model-*.safetensors"):
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        keep = range(location.offset, location.offset + location.size) if path == Path(location.place) else range(0)
        for position in range(header, len(content), 7):
            if position not in keep:
                content[position] ^= 255
        path.write_bytes(content)
    flip(resharded_copy / EXPERT, tensor.offset)
    mend(resharded_copy, v3_copy)
    assert tree(resharded_copy) == tree(v3_resharded)


def bad_sector(monkeypatch: pytest.MonkeyPatch, path: Path, sector: range) -> None:
    """A disk that cannot read some bytes of a file, nor anything that is asked for together with them."""
    read = Reader.read
    inode = path.stat().st_ino

    def fail(self: Reader, buffer: memoryview, begin: int, end: int) -> tuple[memoryview, bool]:
        is_there = self._path == path and path.stat().st_ino == inode
        if is_there and begin < sector.stop and sector.start < end:
            raise ToolkitError(f"{path}: cannot be read at byte {begin}: Input/output error")
        return read(self, buffer, begin, end)

    monkeypatch.setattr(Reader, "read", fail)


def test_a_bad_sector_is_not_read_again(
    resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = file_of(resharded_copy, EXPERT).tensors[2]
    bad_sector(monkeypatch, resharded_copy / EXPERT, range(tensor.offset + 100, tensor.offset + 101))
    assert mend(resharded_copy, source) == [Repaired(path=EXPERT, tensors=(tensor.name,), taken_bytes=tensor.size)]
    assert tree(resharded_copy) == tree(v3_resharded)


def test_a_source_that_cannot_be_read(
    resharded_copy: Path, v3_folder: Path, v3_resharded: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = file_of(resharded_copy, EXPERT).tensors[0]
    location = manifests.open(v3_folder).find(tensor.name)
    assert location is not None
    flip(resharded_copy / EXPERT, tensor.offset)
    flip(resharded_copy / DENSE, 9000)
    with monkeypatch.context() as patch:
        bad_sector(patch, Path(location.place), range(location.offset, location.offset + 1))
        with pytest.raises(UnrepairedError, match="Input/output error") as caught:
            mend(resharded_copy, v3_folder)
    assert [done.path for done in caught.value.repaired] == [DENSE]
    mend(resharded_copy, v3_folder)
    assert tree(resharded_copy) == tree(v3_resharded)


# Documents.


@pytest.mark.parametrize("path", ["source/headers/07.zst", "source/index.json.zst"])
def test_another_version_of_zstd(
    resharded_copy: Path,
    v3_resharded: Path,
    v3_folder: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    """It packs the same content into other bytes; the manifest says so, and all else is as it was."""
    monkeypatch.setattr(rebuild, "pack", zstandard.ZstdCompressor(level=1, write_checksum=True).compress)
    os.truncate(resharded_copy / path, 3)
    assert [done.path for done in mend(resharded_copy, v3_folder)] == [path, "manifest.json"]
    before, now = manifests.load(v3_resharded), manifests.load(resharded_copy)
    assert [document for document in now.documents if document not in before.documents] == [
        dataclasses.replace(
            next(document for document in before.documents if document.path == path),
            size=(resharded_copy / path).stat().st_size,
            sha256=hashlib.sha256((resharded_copy / path).read_bytes()).hexdigest(),
        )
    ]
    assert dataclasses.replace(now, documents=before.documents) == before
    assert is_whole(resharded_copy)
    with quiet(0, label="") as progress:
        check(manifests.open(resharded_copy), jobs=2, progress=progress)
    # That copy helps one with the old bytes, and the other way round.
    other = shutil.copytree(v3_resharded, resharded_copy.parent / "other")
    (other / path).unlink()
    assert [done.path for done in mend(other, resharded_copy)] == [path, "manifest.json"]
    assert is_whole(other)
    (resharded_copy / path).unlink()
    monkeypatch.undo()
    assert [done.path for done in mend(resharded_copy, v3_resharded)] == [path, "manifest.json"]
    assert tree(resharded_copy) == tree(v3_resharded)


def test_shards_that_were_written_again_are_not_the_source(
    resharded_copy: Path, v3_copy: Path, v3_resharded: Path, tree: Tree
) -> None:
    """The same tensors under a header with other metadata, and an index with another blank."""
    index = v3_copy / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes() + b" ")
    name = manifests.load(resharded_copy).source.shards[6].name
    content = (v3_copy / name).read_bytes()
    (v3_copy / name).write_bytes(content.replace(b'{"format":"pt"}', b'{"format":"np"}', 1))
    for path in ("source/headers/07.zst", "source/index.json.zst"):
        flip(resharded_copy / path, 5)
    damaged = tree(resharded_copy)
    with pytest.raises(UnrepairedError) as caught:
        mend(resharded_copy, v3_copy)
    for failure, path in zip(caught.value.failures, (v3_copy / name, index), strict=True):
        assert str(path) in failure
        assert "was made from" in failure
    assert tree(resharded_copy) == damaged


def test_the_manifest_tells_the_truth_also_when_others_fail(
    resharded_copy: Path, v3_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "pack", zstandard.ZstdCompressor(level=1, write_checksum=True).compress)
    flip(resharded_copy / "source/headers/07.zst", 7)
    flip(resharded_copy / "LICENSE", 7)
    (v3_copy / "LICENSE").unlink()
    with pytest.raises(UnrepairedError) as caught:
        mend(resharded_copy, v3_copy)
    assert [done.path for done in caught.value.repaired] == ["source/headers/07.zst", "manifest.json"]
    with quiet(0, label="") as progress:
        damage = verify(manifests.open(resharded_copy), jobs=1, progress=progress)
    assert [one.path for one in damage] == ["LICENSE"]


def test_an_index_of_another_form_is_written_as_ours(resharded_copy: Path, v3_resharded: Path, source: Path) -> None:
    """It follows from the manifest, so it is right whatever it looked like."""
    path = resharded_copy / "model.safetensors.index.json"
    raw = json.dumps(json.loads(path.read_bytes())).encode()
    manifest = manifests.load(resharded_copy)
    sha256 = hashlib.sha256(raw).hexdigest()
    documents = tuple(
        dataclasses.replace(d, size=len(raw), content_size=len(raw), sha256=sha256, content_sha256=sha256)
        if d.role == "index"
        else d
        for d in manifest.documents
    )
    manifests.save(dataclasses.replace(manifest, documents=documents), resharded_copy)
    path.unlink()
    assert [done.path for done in mend(resharded_copy, source)] == [path.name, "manifest.json"]
    assert (resharded_copy / "manifest.json").read_bytes() == (v3_resharded / "manifest.json").read_bytes()
    assert path.read_bytes() == (v3_resharded / path.name).read_bytes()


def test_a_header_of_another_form(resharded_copy: Path, v3_folder: Path, tmp_path: Path, tree: Tree) -> None:
    """Another program wrote it: it is kept while it is there, and only a copy has it when it is not."""
    manifest = manifests.load(resharded_copy)
    files = list(manifest.files)
    number, entry = next((n, file) for n, file in enumerate(files) if file.path == EXPERT)
    path = resharded_copy / EXPERT
    content = bytearray(path.read_bytes())
    raw = content[: entry.header_size].replace(b'{"format":"pt"}', b'{"format":"np"}')
    assert raw != content[: entry.header_size]
    content[: entry.header_size] = raw
    path.write_bytes(content)
    sha256 = hashlib.sha256(raw).hexdigest()
    files[number] = dataclasses.replace(
        entry,
        header_sha256=sha256,
        digest=digest.file_digest(sha256, [tensor.digest or "" for tensor in entry.tensors]),
    )
    manifests.save(dataclasses.replace(manifest, files=tuple(files)), resharded_copy)
    good = tree(shutil.copytree(resharded_copy, tmp_path / "other"))
    flip(path, entry.tensors[0].offset)
    mend(resharded_copy, v3_folder)
    assert tree(resharded_copy) == good
    flip(path, 100)
    with pytest.raises(UnrepairedError, match="its header is damaged, and"):
        mend(resharded_copy, v3_folder)
    mend(resharded_copy, tmp_path / "other")
    assert tree(resharded_copy) == good
    flip(path, 100)
    mend(resharded_copy, pack(tmp_path / "other"))
    assert tree(resharded_copy) == good


# Packed files.


HOW: Mapping[str, Change] = {
    "first byte": lambda path: flip(path, 0),
    "last byte": lambda path: flip(path, path.stat().st_size - 1),
    "cut in the middle": lambda path: os.truncate(path, path.stat().st_size // 2),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 5000),
    "gone": lambda path: path.unlink(),
}


def pack(folder: Path) -> Path:
    with quiet(0, label="") as progress:
        packing.pack(folder, jobs=2, progress=progress)
    return folder


@pytest.fixture
def packed(resharded_copy: Path) -> Path:
    """A packed checkpoint, to be damaged."""
    return pack(resharded_copy)


@pytest.fixture(params=["shards", "plain copy", "packed copy", "copy packed in another way"])
def any_source(
    request: pytest.FixtureRequest,
    v3_folder: Path,
    v3_resharded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    if request.param == "shards":
        return v3_folder
    if request.param == "plain copy":
        return v3_resharded
    with monkeypatch.context() as patch:
        if request.param != "packed copy":
            patch.setattr(archive, "EXPERT_LEVEL", 12)
        return pack(shutil.copytree(v3_resharded, tmp_path / "other"))


@pytest.mark.parametrize("how", ["first byte", "last byte", "cut in the middle", "grown", "gone"])
def test_a_packed_checkpoint(
    packed: Path, any_source: Path, tree: Tree, tmp_path: Path, v3_resharded: Path, how: str
) -> None:
    good = tree(packed)
    paths = [DENSE, f"{EXPERT}.zst", "config.json", "model.safetensors.index.json"]
    for path in paths:
        HOW[how](packed / path)
    expert = next(file for file in manifests.load(packed).files if file.path == f"{EXPERT}.zst")
    done = mend(packed, any_source)
    assert [one.path for one in done] == paths
    is_copied = (any_source / "manifest.json").exists() and expert in manifests.load(any_source).files
    assert done[1].taken_bytes == (expert.size if is_copied else expert.unpacked_size - expert.header_size)
    assert tree(packed) == good
    with quiet(0, label="") as progress:
        packing.unpack(packed, jobs=2, progress=progress)
    assert tree(packed) == tree(v3_resharded)


def test_a_plain_checkpoint_with_a_packed_copy(
    resharded_copy: Path, any_source: Path, v3_resharded: Path, tree: Tree
) -> None:
    tensors = file_of(resharded_copy, EXPERT).tensors
    for number in (1, 4):
        flip(resharded_copy / EXPERT, tensors[number].offset)
    flip(resharded_copy / DENSE, 9000)
    (resharded_copy / "layers/2/experts/04.safetensors").unlink()
    assert mend(resharded_copy, any_source)[1] == Repaired(
        path=EXPERT, tensors=(tensors[1].name, tensors[4].name), taken_bytes=tensors[1].size + tensors[4].size
    )
    assert tree(resharded_copy) == tree(v3_resharded)


def test_an_expert_packed_by_another_version_of_zstd(
    packed: Path, v3_folder: Path, v3_resharded: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = manifests.load(packed)
    path = f"{EXPERT}.zst"
    flip(packed / path, 50)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "EXPERT_LEVEL", 12)
        assert [done.path for done in mend(packed, v3_folder)] == [path, "manifest.json"]
    now = manifests.load(packed)
    content = (packed / path).read_bytes()
    assert [file for file in now.files if file not in before.files] == [
        dataclasses.replace(
            next(file for file in before.files if file.path == path),
            size=len(content),
            stored_sha256=hashlib.sha256(content).hexdigest(),
        )
    ]
    assert dataclasses.replace(now, files=before.files) == before
    assert is_whole(packed)
    with quiet(0, label="") as progress:
        packing.unpack(packed, jobs=2, progress=progress)
    assert tree(packed) == tree(v3_resharded)


def write_else(self: Writer, data: bytes | memoryview, offset: int, write: Any = Writer.write) -> None:
    content = bytearray(data)
    if len(content) > 1000:
        content[900] ^= 1
    write(self, bytes(content), offset)


def pack_else(blocks: Iterable[memoryview], writer: Writer, *, size: int) -> None:
    content = bytearray(b"".join(bytes(block) for block in blocks))
    content[5000] ^= 1
    archive.write_packed([memoryview(content)], writer, size=size)


@pytest.mark.parametrize("what", ["the disk", "memory"])
def test_what_is_packed_wrong(
    packed: Path, v3_folder: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """With another version of zstd no digest is known before; a wrong one must not come into the manifest."""
    flip(packed / f"{EXPERT}.zst", 50)
    damaged = tree(packed)
    monkeypatch.setattr(archive, "EXPERT_LEVEL", 12)
    if what == "memory":
        monkeypatch.setattr(rebuild, "write_packed", pack_else)
    else:
        monkeypatch.setattr(Writer, "write", write_else)
    with pytest.raises(UnrepairedError, match=r"zst\.partial: "):
        mend(packed, v3_folder)
    assert tree(packed) == damaged


def test_wrong_bytes_are_not_packed(packed: Path, v3_copy: Path, v3_resharded: Path, tree: Tree) -> None:
    tensor = next(file for file in manifests.load(packed).files if file.path == f"{EXPERT}.zst").tensors[2]
    location = manifests.open(v3_copy).find(tensor.name)
    assert location is not None
    flip(Path(location.place), location.offset + 7)
    good = tree(packed)
    flip(packed / f"{EXPERT}.zst", 50)
    damaged = tree(packed)
    with pytest.raises(UnrepairedError, match="stays damaged") as caught:
        mend(packed, v3_copy)
    assert location.place in caught.value.failures[0]
    assert tensor.name in caught.value.failures[0]
    assert tree(packed) == damaged
    mend(packed, v3_resharded)
    assert tree(packed) == good


def test_a_packed_copy_that_is_damaged_too(
    packed: Path, resharded_copy: Path, v3_resharded: Path, tree: Tree, tmp_path: Path
) -> None:
    """The packed form of one, and the plain form of another."""
    plain = shutil.copytree(v3_resharded, tmp_path / "plain")
    other = shutil.copytree(packed, tmp_path / "other")
    for folder, path in ((packed, f"{EXPERT}.zst"), (other, f"{EXPERT}.zst"), (plain, EXPERT)):
        flip(folder / path, 5000)
    for folder in (packed, plain):
        damaged = tree(folder)
        with pytest.raises(UnrepairedError) as caught:
            mend(folder, other)
        assert EXPERT in caught.value.failures[0]
        assert str(other / f"{EXPERT}.zst") in caught.value.failures[0]
        assert tree(folder) == damaged
