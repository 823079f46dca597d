"""Cold storage: packed in place and back byte for byte; what is damaged, refused or short; what others say of it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard

import manifests
from manifests.errors import (
    IncompleteError,
    IntegrityError,
    LockedError,
    ManifestError,
    ResourceError,
    SourceNotFoundError,
    ToolkitError,
    UnsupportedModelError,
)
from manifests.paths import ASIDE_NAME, INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME
from manifests.summary import diff
from reshard import blocks, destination, packing
from reshard.journal import Journal
from reshard.lock import lock_folder
from reshard.packing import expert_bytes, interrupted_task
from reshard.progress import Progress
from reshard.restore import check, restore
from reshard.verify import verify

Tree = Callable[[Path], dict[str, str]]
Stamps = Callable[[Path], dict[str, tuple[int, int, int]]]

EXPERT = "layers/1/experts/2.safetensors"
LEFT_OUT = (".cache", "figures/.git", "pytorch_model.bin", "consolidated.safetensors")


def run(task: str, folder: Path, jobs: int = 2) -> Any:
    with Progress(0, label="", quiet=True) as progress:
        return getattr(packing, task)(folder, jobs=jobs, progress=progress)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: shutil.copytree(folder, tmp_path / f"{folder.name}-copy", dirs_exist_ok=False)


def experts_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("layers/*/experts/*"))


# There and back.


@pytest.mark.parametrize("name", ["v2_folder", "v3_folder", "kimi_folder"])
def test_there_and_back(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, reshard_folder: Callable[..., Path], tree: Tree
) -> None:
    source: Path = request.getfixturevalue(name)
    folder = reshard_folder(source, tmp_path / "out")
    before, manifest = tree(folder), manifests.load(folder)
    result = run("pack", folder)
    assert manifests.load(folder) == result
    assert diff(manifest, result) == []
    with Progress(0, label="", quiet=True) as progress:
        assert verify(manifests.open(folder), jobs=2, progress=progress) == []
        proven = check(manifests.open(folder), jobs=2, progress=progress)
        assert restore(manifests.open(folder), tmp_path / "back", jobs=2, progress=progress) == proven
    whole = {path: what for path, what in tree(source).items() if not path.startswith(LEFT_OUT)}
    assert tree(tmp_path / "back") == whole
    assert run("unpack", folder) == manifest
    assert tree(folder) == before


def test_experts_are_packed_and_nothing_else(v2_resharded: Path, v2_packed: Path, tree: Tree) -> None:
    assert experts_of(v2_packed) == [f"{number}.safetensors.zst" for number in range(4)]
    before, after = tree(v2_resharded), tree(v2_packed)
    experts = {f"layers/1/experts/{number}.safetensors" for number in range(4)}
    assert {path for path in before if after.get(path) != before[path]} == {MANIFEST_NAME, INDEX_NAME, *experts}
    for file in manifests.load(v2_packed).files:
        raw = (v2_packed / file.path).read_bytes()
        assert len(raw) == file.size
        if file.kind != "expert":
            assert (file.codec, file.stored_sha256, file.unpacked_size) == ("none", None, file.size)
            continue
        # Any zstd program reads it.
        content = (v2_resharded / file.path.removesuffix(".zst")).read_bytes()
        assert zstandard.ZstdDecompressor().decompress(raw) == content
        parameters = zstandard.get_frame_parameters(raw)
        assert (parameters.content_size, parameters.has_checksum) == (file.unpacked_size, True)
        assert file.unpacked_size == len(content)


def test_the_index_leaves_packed_files_out(v2_resharded: Path, v2_packed: Path) -> None:
    manifest = manifests.load(v2_packed)
    index = json.loads((v2_packed / INDEX_NAME).read_bytes())
    named = {tensor.name: file.path for file in manifest.files if file.codec == "none" for tensor in file.tensors}
    assert index["weight_map"] == named
    assert named.keys() < json.loads((v2_resharded / INDEX_NAME).read_bytes())["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(
        tensor.size for file in manifest.files if file.codec == "none" for tensor in file.tensors
    )


@pytest.mark.parametrize(("jobs", "block_bytes"), [(1, 4096), (4, 1 << 20)])
def test_the_same_checkpoint_gives_the_same_bytes(
    v2_resharded: Path, v2_packed: Path, copy_of: Callable[[Path], Path], tree: Tree, jobs: int, block_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """However the files are cut while they are read."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    folder = copy_of(v2_resharded)
    run("pack", folder, jobs)
    assert tree(folder) == tree(v2_packed)


@pytest.mark.parametrize(("task", "folder"), [("pack", "v2_packed"), ("unpack", "v2_resharded")])
def test_nothing_to_do(task: str, folder: str, request: pytest.FixtureRequest, stamps: Stamps) -> None:
    root: Path = request.getfixturevalue(folder)
    before = stamps(root)
    with Progress(expert_bytes(root), label="", quiet=True) as progress:
        assert getattr(packing, task)(root, jobs=2, progress=progress) == manifests.load(root)
        assert (progress.bytes, progress.done_bytes) == (0, expert_bytes(root))
    assert stamps(root) == before


@pytest.mark.parametrize("task", ["pack", "unpack"])
def test_progress_counts_unpacked_bytes(
    task: str, v2_resharded: Path, v2_packed: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(v2_resharded if task == "pack" else v2_packed)
    total = sum(file.size for file in manifests.load(v2_resharded).files if file.kind == "expert")
    assert expert_bytes(folder) == total
    with Progress(total, label="", quiet=True) as progress:
        getattr(packing, task)(folder, jobs=2, progress=progress)
        assert progress.bytes == total


# Damage.


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 16
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("position", "says"), [(20, "its header is damaged"), (4200, "gate_proj.weight' is damaged"), (None, "2 bytes")]
)
def test_a_damaged_expert_stays_as_it_is(
    v2_resharded: Path, v2_packed: Path, copy_of: Callable[[Path], Path], tree: Tree, position: int | None, says: str
) -> None:
    """It is the only copy of what is left of it, and `repair` wants to see it."""
    folder = copy_of(v2_resharded)
    if position is None:
        (folder / EXPERT).write_bytes(b"ab")
    else:
        flip(folder / EXPERT, position)
    damaged = (folder / EXPERT).read_bytes()
    with pytest.raises(IntegrityError, match=f"{EXPERT}.*{says}.*all else is packed"):
        run("pack", folder)
    assert (folder / EXPERT).read_bytes() == damaged
    manifest = manifests.load(folder)
    assert [file.path for file in manifest.files if file.kind == "expert" and file.codec == "none"] == [EXPERT]
    shutil.copy(v2_resharded / EXPERT, folder / EXPERT)
    run("pack", folder)
    assert tree(folder) == tree(v2_packed)


@pytest.mark.parametrize("position", [0, 5, 300, -1])
def test_a_damaged_packed_expert(
    v2_resharded: Path, v2_packed: Path, copy_of: Callable[[Path], Path], tmp_path: Path, tree: Tree, position: int
) -> None:
    folder = copy_of(v2_packed)
    path = f"{EXPERT}.zst"
    flip(folder / path, position)
    with Progress(0, label="", quiet=True) as progress:
        assert [finding.path for finding in verify(manifests.open(folder), jobs=1, progress=progress)] == [path]
        with pytest.raises(IntegrityError, match=rf"{path}: "):
            check(manifests.open(folder), jobs=1, progress=progress)
        with pytest.raises(IntegrityError, match=rf"{path}: "):
            restore(manifests.open(folder), tmp_path / "back", jobs=1, progress=progress)
    with pytest.raises(IntegrityError, match=f"{path}: .*all else is unpacked"):
        run("unpack", folder)
    assert experts_of(folder) == [f"{number}.safetensors{'.zst' if number == 2 else ''}" for number in range(4)]
    shutil.copy(v2_packed / path, folder / path)
    run("unpack", folder)
    assert tree(folder) == tree(v2_resharded)


def test_an_expert_that_the_disk_does_not_give(
    v2_resharded: Path, v2_packed: Path, copy_of: Callable[[Path], Path], tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known to be damaged."""
    folder = copy_of(v2_resharded)
    real = os.preadv

    def preadv(descriptor: int, *arguments: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(EXPERT):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(ToolkitError, match=f"{EXPERT}: cannot be read.*all else is packed") as raised:
            run("pack", folder)
    assert raised.type is ToolkitError
    run("pack", folder)
    assert tree(folder) == tree(v2_packed)


@pytest.mark.parametrize(("task", "made"), [("pack", f"{EXPERT}.zst"), ("unpack", EXPERT)])
def test_what_is_written_wrong_is_read_back_and_found(
    v2_resharded: Path, v2_packed: Path, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, task: str,
    made: str, tree: Tree,
) -> None:  # fmt: skip
    """A disk that stores other bytes than it was given, or a compressor that errs: the other file is still there."""
    start, end = (v2_resharded, v2_packed) if task == "pack" else (v2_packed, v2_resharded)
    folder = copy_of(start)
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"{made}.partial") and len(data) > 1000:
            data = bytes(data[:1000]) + bytes([data[1000] ^ 1]) + bytes(data[1001:])
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(IntegrityError, match=r"experts/2.*must be read back right"):
            run(task, folder, jobs=1)
    source = EXPERT if task == "pack" else f"{EXPERT}.zst"
    assert (folder / source).read_bytes() == (start / source).read_bytes()
    assert not (folder / made).exists()
    run(task, folder)
    assert tree(folder) == tree(end)


def test_a_folder_that_could_not_be_written_is_forgotten_by_no_worker(
    v2_resharded: Path, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it only to the first who asks; the others must not delete what was made of it."""
    folder, real, asked = copy_of(v2_resharded), packing.sync_folder, []
    before = {path.name for path in folder.glob("layers/*/experts/*")}

    def sync(path: Path) -> None:
        if path.name == "experts":
            asked.append(path)
            if len(asked) == 1:
                time.sleep(0.3)  # the others are done meanwhile
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        real(path)

    monkeypatch.setattr(packing, "sync_folder", sync)
    with pytest.raises(ToolkitError, match="Input/output error"):
        run("pack", folder, jobs=4)
    assert len(asked) == 1
    assert {path.name for path in folder.glob("layers/*/experts/*.safetensors")} == before


def test_no_space_is_called_so_when_what_was_written_is_opened(
    v2_packed: Path, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = copy_of(v2_packed), os.open

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if str(path).endswith(EXPERT) and flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(ResourceError, match=r"experts/2.*No space left.*must be read back right"):
            run("unpack", folder, jobs=1)


# What is refused, and what is short.


@pytest.mark.parametrize("task", ["pack", "unpack"])
def test_too_little_room_is_said_before_anything_is_written(
    task: str, v2_resharded: Path, v2_packed: Path, monkeypatch: pytest.MonkeyPatch, stamps: Stamps
) -> None:
    root = v2_resharded if task == "pack" else v2_packed
    before = stamps(root)
    monkeypatch.setattr(destination, "free_bytes", lambda _: 10_000)
    with pytest.raises(ResourceError, match="nothing was written"):
        run(task, root)
    assert stamps(root) == before


def test_room_for_one_expert_of_each_job_is_asked_for(v2_resharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def check_room(_: Path, needed: int) -> None:
        asked.append(needed)
        raise ResourceError("enough seen")

    monkeypatch.setattr(packing, "check_room", check_room)
    for jobs in (1, 2, 3, 9):
        with pytest.raises(ResourceError):
            run("pack", v2_resharded, jobs)
    size = (v2_resharded / EXPERT).stat().st_size
    steps = [later - sooner for sooner, later in pairwise(asked)]
    assert size <= steps[0] == steps[1] == steps[2] <= size * 1.01 + 4096


def test_room_for_all_that_grows_is_asked_for(
    tmp_path: Path, write_shards: Callable[..., Path], random_tensor: Callable[..., Any],
    reshard_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    names = [f"model.layers.1.mlp.experts.{number}.up_proj.weight" for number in range(5)]
    zeros = [dataclasses.replace(random_tensor(name, "BF16", 50_000), data=bytes(100_000)) for name in names]
    folder = reshard_folder(write_shards(tmp_path / "source", [zeros]), tmp_path / "out")
    monkeypatch.setattr(destination, "free_bytes", lambda _: 150_000)
    assert sum(file.size for file in run("pack", folder, 1).files) < 20_000
    with pytest.raises(ResourceError, match="nothing was written"):
        run("unpack", folder, 1)
    monkeypatch.setattr(destination, "free_bytes", lambda _: 5 * 105_000 + 105_000 + 20_000)
    run("unpack", folder, 1)


def test_one_at_a_time(v2_resharded: Path, stamps: Stamps) -> None:
    before = stamps(v2_resharded)
    with lock_folder(v2_resharded), pytest.raises(LockedError):
        run("pack", v2_resharded)
    assert stamps(v2_resharded) == before


def test_what_is_no_resharded_checkpoint(v2_folder: Path, tmp_path: Path) -> None:
    for folder in (v2_folder, tmp_path, tmp_path / "no such", v2_folder / "config.json"):
        for task in ("pack", "unpack"):
            with pytest.raises(SourceNotFoundError, match="resharded checkpoint"):
                run(task, folder)
    assert not (tmp_path / "no such").exists()


@pytest.mark.parametrize("task", ["run", "restore"])
def test_another_interrupted_command_comes_first(
    v2_resharded: Path, copy_of: Callable[[Path], Path], task: str
) -> None:
    folder = copy_of(v2_resharded)
    Journal.create(folder, {"task": task}).close()
    with pytest.raises(ManifestError, match=f"`reshard {task}` was interrupted here; finish that first"):
        run("pack", folder)
    assert interrupted_task(folder) is None
    assert (folder / JOURNAL_NAME).exists()


def test_a_folder_that_restore_takes_apart(v2_resharded: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(v2_resharded)
    (folder / MANIFEST_NAME).rename(folder / ASIDE_NAME)
    with pytest.raises(IncompleteError, match="restore --consume"):
        run("pack", folder)


def test_links_and_strangers_are_refused(
    v2_resharded: Path, copy_of: Callable[[Path], Path], tmp_path: Path, stamps: Stamps
) -> None:
    folder = copy_of(v2_resharded)
    (folder / f"{EXPERT}.zst").write_bytes(b"somebody's")
    before = stamps(folder)
    with pytest.raises(ToolkitError, match=r"2\.safetensors\.zst: is in the way"):
        run("pack", folder)
    assert stamps(folder) == before
    (folder / f"{EXPERT}.zst").unlink()
    (folder / f"{EXPERT}.zst").symlink_to(folder / "config.json")
    with pytest.raises(ToolkitError, match=r"2\.safetensors\.zst: is a link"):
        run("pack", folder)
    (folder / f"{EXPERT}.zst").unlink()
    (folder / EXPERT).rename(folder / "elsewhere")
    (folder / EXPERT).symlink_to(folder / "elsewhere")
    before = stamps(folder)
    with pytest.raises(ToolkitError, match=r"2\.safetensors: is a link"):
        run("pack", folder)
    assert stamps(folder) == before


def test_what_somebody_unpacked_by_hand_is_taken(
    v2_resharded: Path, v2_packed: Path, copy_of: Callable[[Path], Path], tree: Tree
) -> None:
    folder = copy_of(v2_packed)
    shutil.copy(v2_resharded / EXPERT, folder / EXPERT)
    run("unpack", folder)
    assert tree(folder) == tree(v2_resharded)


# What others say of a packed checkpoint.


def test_a_packed_expert_is_not_mapped(v2_packed: Path) -> None:
    checkpoint = manifests.open(v2_packed)
    assert len(checkpoint.unreadable()) == 4
    with pytest.raises(UnsupportedModelError, match=r"experts/2\.safetensors\.zst.*cannot be mapped; `reshard unpack`"):
        checkpoint.expert(1, 2)
    place = checkpoint.locate("model.layers.1.mlp.experts.2.up_proj.weight")
    assert place is not None
    assert (place.codec, place.file) == ("zstd", f"{EXPERT}.zst")
    assert checkpoint.dense(1)


def test_inspection_shows_both_sizes(v2_packed: Path, v2_resharded: Path, program: Callable[..., Any]) -> None:
    shown = program("manifests", "show", v2_packed, "--json").json
    files = [file for file in manifests.load(v2_packed).files if file.codec == "zstd"]
    assert shown["packed_files"] == len(files) == 4
    assert shown["packed_bytes"] == sum((v2_packed / file.path).stat().st_size for file in files)
    assert shown["unpacked_bytes"] == expert_bytes(v2_resharded)
    assert "packed                  4   " in program("manifests", "show", v2_packed).out
    assert "packed" not in program("manifests", "show", v2_resharded).out
    assert program("manifests", "show", v2_resharded, "--json").json["packed_files"] == 0
    rows = {row["name"]: row for row in program("manifests", "ls", v2_packed, "--json").json}
    assert {row["codec"] for name, row in rows.items() if ".experts." in name} == {"zstd"}
    assert {row["codec"] for name, row in rows.items() if ".experts." not in name} == {"none"}
    result = program("manifests", "ls", v2_packed, "--expert", 2)
    assert result.err == "note: byte ranges in files that end in .zst are those of the unpacked file\n"
    assert program("manifests", "ls", v2_packed, "--layer", 0).err == ""
    checked = program("manifests", "check", v2_packed)
    assert checked.code == 0
    assert checked.out.endswith("; 4 of them are packed, only their sizes were looked at\n")
    assert program("manifests", "check", v2_resharded).out.endswith("sizes and headers are right\n")
    same = program("manifests", "diff", v2_packed, v2_resharded)
    tensors = len(program("manifests", "ls", v2_resharded, "--json").json)
    assert (same.code, same.out, same.err) == (0, "", f"equal: {tensors} tensors\n")
