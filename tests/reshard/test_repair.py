"""Every kind of damage goes away, with the source's shards or with another copy; nothing wrong ever takes a place."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

import manifests
from manifests import digest, validate
from manifests.errors import (
    IncompleteError,
    IntegrityError,
    LockedError,
    ManifestError,
    ResourceError,
    SourceNotFoundError,
    ToolkitError,
)
from manifests.schema import FileEntry
from manifests.storage import encode
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


def test_nothing_is_touched_where_nothing_is_damaged(
    resharded_copy: Path, source: Path, stamps: Callable[[Path], Any]
) -> None:
    (resharded_copy / "a note.txt").write_text("mine")
    before = stamps(resharded_copy)
    assert mend(resharded_copy, source) == []
    assert stamps(resharded_copy) == before


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    """Its content is right, and in somebody else's hands."""
    root = next(folder for folder in path.parents if (folder / "manifest.json").exists())
    elsewhere = root.parent / path.relative_to(root).as_posix().replace("/", " ")
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


HOW: Mapping[str, Change] = {
    "first byte": lambda path: flip(path, 0),
    "last byte": lambda path: flip(path, path.stat().st_size - 1),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in the middle": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 5000),
    "gone": lambda path: path.unlink(),
    "a FIFO": replace_by_fifo,
    "a link that leaves": replace_by_link,
}
WHERE = [
    DENSE, EXPERT, "model/embed.safetensors", "config.json", "figures/deep/benchmark 1.txt",
    "model.safetensors.index.json", "source/headers/07.zst", "source/index.json.zst",
]  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_every_kind_of_damage(
    resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree, how: str, deadline: None
) -> None:
    for path in WHERE:
        HOW[how](resharded_copy / path)
    with quiet(0, label="") as progress:
        damage = verify(manifests.open(resharded_copy), jobs=2, progress=progress)
    assert {one.path for one in damage} == set(WHERE)
    assert [done.path for done in mend(resharded_copy, source)] == WHERE
    assert tree(resharded_copy) == tree(v3_resharded)


@pytest.mark.parametrize("seed", range(5))
def test_much_damage_at_once(resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree, seed: int) -> None:
    chance = random.Random(seed)
    manifest = manifests.load(resharded_copy)
    entries = [entry for entry in (*manifest.files, *manifest.documents) if entry.size > 1]
    damaged = chance.sample(entries, chance.randrange(1, len(entries)))
    for entry in damaged:
        path = resharded_copy / entry.path
        HOW[chance.choice(list(HOW))](path)
        for _ in range(chance.randrange(4)):
            if path.is_file() and not path.is_symlink() and path.stat().st_size:
                flip(path, chance.randrange(path.stat().st_size))
    found = [entry.path for entry in entries if entry in damaged]
    repaired = mend(resharded_copy, source, jobs=1 + seed)
    # Two flips of one bit are none.
    assert [done.path for done in repaired] == [path for path in found if path in {done.path for done in repaired}]
    assert tree(resharded_copy) == tree(v3_resharded)


def test_all_but_the_manifest_is_gone(resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree) -> None:
    for entry in resharded_copy.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "manifest.json":
            entry.unlink()
    manifest = manifests.load(resharded_copy)
    repaired = mend(resharded_copy, source, jobs=4)
    assert [done.path for done in repaired] == [entry.path for entry in (*manifest.files, *manifest.documents)]
    assert tree(resharded_copy) == tree(v3_resharded)


def test_what_is_told_of_a_repair(resharded_copy: Path, source: Path) -> None:
    file = file_of(resharded_copy, EXPERT)
    for number in (1, 4):
        flip(resharded_copy / EXPERT, file.tensors[number].offset)
    flip(resharded_copy / DENSE, 4095)  # a blank of its header
    os.truncate(resharded_copy / "LICENSE", 1)
    size = manifests.load(resharded_copy).documents[1].size
    told: list[Any] = []
    shown: list[tuple[int, str]] = []

    def progress(total_bytes: int, *, label: str) -> Progress:
        shown.append((total_bytes, label))
        return Progress(total_bytes, label=label, quiet=True, events=told.append)

    done = repair(resharded_copy, source, jobs=1, progress=progress)
    names = (file.tensors[1].name, file.tensors[4].name)
    assert done == [
        Repaired(path=DENSE, taken_bytes=0),
        Repaired(path=EXPERT, tensors=names, taken_bytes=file.tensors[1].size + file.tensors[4].size),
        Repaired(path="LICENSE", taken_bytes=size),
    ]
    manifest = manifests.load(resharded_copy)
    entries = [*manifest.files, *manifest.documents]
    assert shown == [
        (sum(entry.size for entry in entries), "verify"),
        (sum(entry.size for entry in entries if entry.path in (DENSE, EXPERT, "LICENSE")), "repair"),
    ]
    assert [event for event in told if event["event"] == "repaired"] == [
        {"event": "repaired", **dataclasses.asdict(one)} for one in done
    ]


# Only what is damaged is taken.


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
        flip(here.path, here.offset + 1000)
        flip(here.path, here.offset + 1999)
        flip(here.path, here.offset + 2399)
        reads.clear()
        assert mend(out, origin) == [Repaired(path=here.file, tensors=("model.embed_tokens.weight",), taken_bytes=1400)]
        assert sum(end - begin for path, begin, end in reads if path == there.path) == 1400
        assert {path for path, _, _ in reads if path.is_relative_to(origin)} == {there.path}
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
        keep = range(location.offset, location.offset + location.size) if path == location.path else range(0)
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


# What is wrong takes no place.


def test_a_source_that_is_damaged_too(
    resharded_copy: Path, v3_copy: Path, v3_resharded: Path, tree: Tree, stamps: Callable[[Path], Any]
) -> None:
    """The other files are repaired; those keep what they have."""
    tensor = file_of(resharded_copy, EXPERT).tensors[1]
    location = manifests.open(v3_copy).find(tensor.name)
    assert location is not None
    flip(location.path, location.offset + location.size - 1)
    flip(v3_copy / "tokenizer.json", 3)
    flip(resharded_copy / EXPERT, tensor.offset + 5)
    flip(resharded_copy / DENSE, 9000)
    flip(resharded_copy / "tokenizer.json", 4)
    flip(resharded_copy / "config.json", 4)
    damaged = tree(resharded_copy)
    before = stamps(resharded_copy)
    with pytest.raises(UnrepairedError) as caught:
        mend(resharded_copy, v3_copy)
    assert caught.value.exit_code == 13
    assert [done.path for done in caught.value.repaired] == [DENSE, "config.json"]
    first, second = caught.value.failures
    assert tensor.name in first
    assert str(location.path) in first
    assert str(v3_copy / "tokenizer.json") in second
    assert str(caught.value) == f"{first} (and 1 more files are damaged still)"
    good = tree(v3_resharded)
    assert tree(resharded_copy) == damaged | {path: good[path] for path in (DENSE, "config.json")}
    for path in (EXPERT, "tokenizer.json"):
        assert stamps(resharded_copy)[str(resharded_copy / path)] == before[str(resharded_copy / path)]
    # With another copy the rest is repaired.
    assert [done.path for done in mend(resharded_copy, v3_resharded)] == [EXPERT, "tokenizer.json"]
    assert tree(resharded_copy) == good


def test_a_copy_that_is_damaged_too(resharded_copy: Path, v3_resharded: Path, tmp_path: Path, tree: Tree) -> None:
    other = shutil.copytree(v3_resharded, tmp_path / "other")
    tensor = file_of(other, EXPERT).tensors[0]
    paths = [EXPERT, "LICENSE", "source/headers/01.zst", "source/index.json.zst"]
    for folder in (resharded_copy, other):
        for path in paths:
            flip(folder / path, tensor.offset if path == EXPERT else 5)
    damaged = tree(resharded_copy)
    with pytest.raises(IntegrityError) as caught:
        mend(resharded_copy, other)
    assert isinstance(caught.value, UnrepairedError)
    assert caught.value.repaired == ()
    for path, failure in zip(paths, caught.value.failures, strict=True):
        assert str(other / path) in failure
    assert tree(resharded_copy) == damaged


def test_a_source_that_cannot_be_read(
    resharded_copy: Path, v3_folder: Path, v3_resharded: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = file_of(resharded_copy, EXPERT).tensors[0]
    location = manifests.open(v3_folder).find(tensor.name)
    assert location is not None
    flip(resharded_copy / EXPERT, tensor.offset)
    flip(resharded_copy / DENSE, 9000)
    with monkeypatch.context() as patch:
        bad_sector(patch, location.path, range(location.offset, location.offset + 1))
        with pytest.raises(UnrepairedError, match="Input/output error") as caught:
            mend(resharded_copy, v3_folder)
    assert [done.path for done in caught.value.repaired] == [DENSE]
    mend(resharded_copy, v3_folder)
    assert tree(resharded_copy) == tree(v3_resharded)


def test_another_model(resharded_copy: Path, v2_folder: Path, tree: Tree) -> None:
    flip(resharded_copy / "model/embed.safetensors", 5000)
    flip(resharded_copy / EXPERT, 5000)
    flip(resharded_copy / "config.json", 5)
    flip(resharded_copy / "source/headers/01.zst", 5)  # it would say where the embedding came from
    damaged = tree(resharded_copy)
    with pytest.raises(UnrepairedError) as caught:
        mend(resharded_copy, v2_folder)
    expert, embed, config, header = caught.value.failures
    assert "has no tensor 'model.layers.2.mlp.experts.3." in expert
    assert "it came from model-000" in expert
    assert "BF16 [30, 40] and not BF16 [67, 136]" in embed
    assert str(v2_folder / "config.json") in config
    assert "model-00001-of-" in header
    assert tree(resharded_copy) == damaged


def test_one_shard_gives_what_it_has(resharded_copy: Path, v3_folder: Path, v3_resharded: Path, tree: Tree) -> None:
    """Whoever has deleted the source downloads one shard again, and is told which."""
    first, second = (file_of(resharded_copy, path).tensors[0] for path in (EXPERT, DENSE))
    flip(resharded_copy / EXPERT, first.offset)
    flip(resharded_copy / DENSE, second.offset)
    shards = [manifests.open(v3_folder).find(tensor.name) for tensor in (first, second)]
    assert shards[0] is not None
    assert shards[1] is not None
    with pytest.raises(UnrepairedError) as caught:
        mend(resharded_copy, shards[0].path)
    assert [done.path for done in caught.value.repaired] == [EXPERT]
    assert len(caught.value.failures) == 1
    assert f"has no tensor {second.name!r}; it came from {shards[1].file}" in caught.value.failures[0]
    assert [done.path for done in mend(resharded_copy, shards[1].path)] == [DENSE]
    assert tree(resharded_copy) == tree(v3_resharded)


def test_a_folder_that_leads_elsewhere_is_not_written_to(
    resharded_copy: Path, v3_resharded: Path, tmp_path: Path, tree: Tree
) -> None:
    shutil.move(resharded_copy / "layers/2", tmp_path / "elsewhere")
    (resharded_copy / "layers/2").symlink_to(tmp_path / "elsewhere")
    flip(tmp_path / "elsewhere/dense.safetensors", 9000)
    before = tree(tmp_path / "elsewhere")
    with pytest.raises(UnrepairedError, match="layers/2: a link that leaves the folder"):
        mend(resharded_copy, v3_resharded)
    assert tree(tmp_path / "elsewhere") == before


def test_a_folder_in_the_place_of_a_file_stays(resharded_copy: Path, source: Path, tree: Tree) -> None:
    (resharded_copy / EXPERT).unlink()
    (resharded_copy / EXPERT).mkdir()
    (resharded_copy / EXPERT / "mine").touch()
    flip(resharded_copy / DENSE, 9000)
    with pytest.raises(UnrepairedError, match=f"{EXPERT}: cannot be written: Is a directory") as caught:
        mend(resharded_copy, source)
    assert [done.path for done in caught.value.repaired] == [DENSE]
    assert (resharded_copy / EXPERT / "mine").exists()
    assert not list(resharded_copy.rglob("*.partial"))


# Interrupted, and again.


def test_what_an_interrupted_repair_left_is_replaced(
    resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree
) -> None:
    for path in (EXPERT, "config.json", "source/headers/03.zst", "model.safetensors.index.json"):
        flip(resharded_copy / path, 5)
        (resharded_copy / f"{path}.partial").write_bytes(b"half" * 5000)
    mend(resharded_copy, source)
    assert tree(resharded_copy) == tree(v3_resharded)


@pytest.mark.parametrize("name", ["fsync", "rename", "pwrite"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failing_disk_leaves_what_was_there(
    resharded_copy: Path,
    v3_resharded: Path,
    source: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
) -> None:
    """Each file is damaged as it was or repaired, and another repair ends what this one began."""
    for path in (EXPERT, DENSE, "config.json"):
        flip(resharded_copy / path, 5)
    damaged, good = tree(resharded_copy), tree(v3_resharded)
    real, calls = getattr(os, name), [0]

    def fail(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] >= number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(UnrepairedError, match="Input/output error"):
            mend(resharded_copy, source, jobs=1)
    after = tree(resharded_copy)
    assert after.keys() == damaged.keys()
    assert all(what in (damaged[path], good[path]) for path, what in after.items())
    mend(resharded_copy, source)
    assert tree(resharded_copy) == good


def repair_and_die(folder: Path, source: Path, point: int) -> bool:
    """Repair in another process, which ends without a word before the n-th call that changes something."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    left = [point]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return real(*arguments, **options)

        return call

    for name in ("pwrite", "fsync", "rename", "unlink", "mkdir", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))
    with contextlib.suppress(BaseException):
        mend(folder, source, jobs=1)
        os._exit(0)
    os._exit(1)


def test_killed_anywhere(v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], tree: Tree) -> None:
    """Each file is damaged as it was or whole, and another repair ends what this one began."""
    out = reshard_folder(v2_folder, tmp_path / "out")
    paths = ["layers/1/experts/2.safetensors", "config.json", "model.safetensors.index.json", "source/headers/3.zst"]
    good = tree(out)
    for path in paths:
        flip(out / path, 5)
    damaged = tree(out)
    states = set()
    point = 1
    while not repair_and_die(out, v2_folder, point):
        after = {path: what for path, what in tree(out).items() if not path.endswith(".partial")}
        assert all(what in (damaged[path], good[path]) for path, what in after.items())
        assert after.keys() == damaged.keys()
        whole = [path for path in paths if after[path] == good[path]]
        states.add(tuple(whole))
        for path in whole:
            flip(out / path, 5)
        point += 1
    assert point > 20
    assert states == {tuple(paths[:count]) for count in range(len(paths) + 1)}
    assert tree(out) == good


def test_a_full_disk_ends_it(
    resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(resharded_copy / EXPERT, 5)
    damaged = tree(resharded_copy)

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(ResourceError, match="no space left"):
            mend(resharded_copy, source)
    assert tree(resharded_copy) == damaged


def test_too_little_room_is_found_before_anything_is_written(
    resharded_copy: Path, source: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing file takes its size; one that is replaced takes it only while both are there."""
    sizes = {path: (resharded_copy / path).stat().st_size for path in (EXPERT, DENSE, "model/embed.safetensors")}
    (resharded_copy / EXPERT).unlink()
    flip(resharded_copy / DENSE, 5)
    flip(resharded_copy / "model/embed.safetensors", 5)
    needed = sizes[EXPERT] + max(sizes[DENSE], sizes["model/embed.safetensors"])
    free = [needed - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free[0]}))
    damaged = tree(resharded_copy)
    with pytest.raises(ResourceError, match=f"needs {needed:,} bytes"):
        mend(resharded_copy, source, jobs=1)
    assert tree(resharded_copy) == damaged
    free[0] = needed
    assert len(mend(resharded_copy, source, jobs=1)) == 3


def test_ctrl_c_leaves_what_was_there(
    resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(resharded_copy / EXPERT, 5)
    damaged = tree(resharded_copy)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rebuild, "pump", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mend(resharded_copy, source)
    assert tree(resharded_copy) == damaged
    mend(resharded_copy, source)
    assert tree(resharded_copy) == tree(v3_resharded)


def test_a_new_file_is_durable_before_it_takes_its_place(
    resharded_copy: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a crash could leave the name without the bytes, where both were before."""
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(("rename", str(b))), rename(a, b))[1])
    shutil.rmtree(resharded_copy / "layers/2")
    mend(resharded_copy, source, jobs=1)
    path = resharded_copy / EXPERT
    at = calls.index(("rename", str(path)))
    assert calls[at - 1] == ("fsync", f"{path}.partial")
    folders = [path.parent, resharded_copy / "layers/2", resharded_copy / "layers", resharded_copy]
    assert calls[at + 1 : at + 5] == [("fsync", str(folder)) for folder in folders]


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
    flip(location.path, location.offset + 7)
    good = tree(packed)
    flip(packed / f"{EXPERT}.zst", 50)
    damaged = tree(packed)
    with pytest.raises(UnrepairedError, match="stays damaged") as caught:
        mend(packed, v3_copy)
    assert str(location.path) in caught.value.failures[0]
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


# The manifest.


MANIFEST_DAMAGE: Mapping[str, Change] = {
    "a flipped bit": lambda path: flip(path, 5000),
    "a flipped bit of its digest": lambda path: flip(path, path.read_bytes().index(b'"manifest_sha256":"') + 20),
    "another version": lambda path: path.write_bytes(path.read_bytes().replace(b'"version":1}', b'"version":3}')),
    "cut": lambda path: os.truncate(path, 1000),
    "emptied": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "a FIFO": replace_by_fifo,
}


@pytest.mark.parametrize("how", MANIFEST_DAMAGE)
def test_a_damaged_manifest_is_that_of_a_copy(
    resharded_copy: Path, v3_resharded: Path, tree: Tree, how: str, deadline: None
) -> None:
    MANIFEST_DAMAGE[how](resharded_copy / "manifest.json")
    assert mend(resharded_copy, v3_resharded) == [
        Repaired(path="manifest.json", taken_bytes=(v3_resharded / "manifest.json").stat().st_size)
    ]
    assert tree(resharded_copy) == tree(v3_resharded)


@pytest.mark.parametrize("how", MANIFEST_DAMAGE)
def test_shards_cannot_replace_a_manifest(resharded_copy: Path, v3_folder: Path, how: str, deadline: None) -> None:
    MANIFEST_DAMAGE[how](resharded_copy / "manifest.json")
    with pytest.raises(ManifestError if how not in ("gone", "a FIFO") else SourceNotFoundError) as caught:
        mend(resharded_copy, v3_folder)
    assert "manifest.json" in str(caught.value)
    assert f"{v3_folder} is not resharded" in str(caught.value)


def test_a_damaged_manifest_and_damaged_files(resharded_copy: Path, v3_resharded: Path, tree: Tree) -> None:
    """What is left of the manifest says that it was the same, so files may differ from it."""
    flip(resharded_copy / "manifest.json", 5000)
    flip(resharded_copy / EXPERT, 5000)
    assert [done.path for done in mend(resharded_copy, v3_resharded)] == ["manifest.json", EXPERT]
    assert tree(resharded_copy) == tree(v3_resharded)


@pytest.mark.parametrize("how", ["a flipped bit of its digest", "cut", "gone"])
def test_a_manifest_that_may_be_another_models(resharded_copy: Path, v3_resharded: Path, tree: Tree, how: str) -> None:
    """A model that was trained on from this one, a little: with the manifest of this one it would be `repaired`."""
    MANIFEST_DAMAGE[how](resharded_copy / "manifest.json")
    flip(resharded_copy / EXPERT, 5000)
    damaged = tree(resharded_copy)
    with pytest.raises((ManifestError, SourceNotFoundError), match=f"does not fit, for 1 files .* {EXPERT}"):
        mend(resharded_copy, v3_resharded)
    assert tree(resharded_copy) == damaged


def test_the_manifest_of_a_later_version_is_not_damaged(
    resharded_copy: Path, v3_resharded: Path, tmp_path: Path, tree: Tree
) -> None:
    other = dataclasses.replace(manifests.load(resharded_copy), selection=manifests.load(v3_resharded).selection)
    raw = encode(dataclasses.replace(other, model=dataclasses.replace(other.model, num_experts_per_tok=7)))
    (resharded_copy / "manifest.json").write_bytes(raw.replace(b'"version":1}', b'"version":2}'))
    before = tree(resharded_copy)
    with pytest.raises(ManifestError, match="the only one this program knows"):
        mend(resharded_copy, v3_resharded)
    assert tree(resharded_copy) == before


def test_other_copies_do_not_fit(
    resharded_copy: Path, v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], tree: Tree
) -> None:
    flip(resharded_copy / "manifest.json", 5000)
    damaged = tree(resharded_copy)
    with pytest.raises(ManifestError, match="does not fit"):
        mend(resharded_copy, reshard_folder(v2_folder, tmp_path / "v2"))
    assert tree(resharded_copy) == damaged


# Refused.


@pytest.mark.parametrize("name", ["reshard-journal.jsonl", "manifest.json.aside"])
@pytest.mark.parametrize("is_there", [True, False])
def test_an_unfinished_folder(resharded_copy: Path, source: Path, tree: Tree, name: str, is_there: bool) -> None:
    if not is_there:
        (resharded_copy / "manifest.json").unlink()
    (resharded_copy / name).touch()
    flip(resharded_copy / EXPERT, 5)
    before = tree(resharded_copy)
    with pytest.raises(IncompleteError, match="the same"):
        mend(resharded_copy, source)
    assert tree(resharded_copy) == before


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_a_folder_that_another_writes(resharded_copy: Path, source: Path) -> None:
    flip(resharded_copy / EXPERT, 5)
    with held(resharded_copy), pytest.raises(LockedError):
        mend(resharded_copy, source)
    assert len(mend(resharded_copy, source)) == 1


def test_from_itself_or_from_nothing(resharded_copy: Path, v3_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(resharded_copy)
    with pytest.raises(ToolkitError, match="cannot be repaired from itself"):
        mend(resharded_copy, tmp_path / "link")
    with pytest.raises(SourceNotFoundError, match="absent"):
        mend(resharded_copy, tmp_path / "absent")
    with pytest.raises(SourceNotFoundError, match="absent: no such folder; give the resharded checkpoint"):
        mend(tmp_path / "absent", resharded_copy)
    with pytest.raises(ToolkitError):
        mend(v3_folder, resharded_copy)
