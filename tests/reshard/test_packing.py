"""Cold storage: packed in place and back byte for byte, whatever happens in between; nothing is lost or left over."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from reshard import archive, blocks, destination, packing
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, v2_folder: Path, reshard_folder: Callable[..., Path]) -> Path:
    """A checkpoint with four experts; read-only by agreement."""
    return reshard_folder(v2_folder, tmp_path_factory.mktemp("packing") / "plain")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    """The same with its experts packed; read-only by agreement."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("packing") / "packed")
    run("pack", folder)
    return folder


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
    packed = run("pack", folder)
    assert manifests.load(folder) == packed
    assert diff(manifest, packed) == []
    with Progress(0, label="", quiet=True) as progress:
        assert verify(manifests.open(folder), jobs=2, progress=progress) == []
        proven = check(manifests.open(folder), jobs=2, progress=progress)
        assert restore(manifests.open(folder), tmp_path / "back", jobs=2, progress=progress) == proven
    whole = {path: what for path, what in tree(source).items() if not path.startswith(LEFT_OUT)}
    assert tree(tmp_path / "back") == whole
    assert run("unpack", folder) == manifest
    assert tree(folder) == before


def test_experts_are_packed_and_nothing_else(plain: Path, packed: Path, tree: Tree) -> None:
    assert experts_of(packed) == [f"{number}.safetensors.zst" for number in range(4)]
    before, after = tree(plain), tree(packed)
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed == {MANIFEST_NAME, INDEX_NAME, *(path for path in before if path.endswith((".0", "/experts/0")))} | {
        f"layers/1/experts/{number}.safetensors" for number in range(4)
    }
    for file in manifests.load(packed).files:
        raw = (packed / file.path).read_bytes()
        assert len(raw) == file.size
        if file.kind != "expert":
            assert (file.codec, file.stored_sha256, file.unpacked_size) == ("none", None, file.size)
            continue
        # Any zstd program reads it.
        content = (plain / file.path.removesuffix(".zst")).read_bytes()
        assert zstandard.ZstdDecompressor().decompress(raw) == content
        parameters = zstandard.get_frame_parameters(raw)
        assert (parameters.content_size, parameters.has_checksum) == (file.unpacked_size, True)
        assert file.unpacked_size == len(content)


def test_the_index_leaves_packed_files_out(plain: Path, packed: Path) -> None:
    manifest = manifests.load(packed)
    index = json.loads((packed / INDEX_NAME).read_bytes())
    named = {tensor.name: file.path for file in manifest.files if file.codec == "none" for tensor in file.tensors}
    assert index["weight_map"] == named
    assert named.keys() < json.loads((plain / INDEX_NAME).read_bytes())["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(
        tensor.size for file in manifest.files if file.codec == "none" for tensor in file.tensors
    )


@pytest.mark.parametrize(("jobs", "block_bytes"), [(1, 4096), (4, 1 << 20)])
def test_the_same_checkpoint_gives_the_same_bytes(
    plain: Path, packed: Path, copy_of: Callable[[Path], Path], tree: Tree, jobs: int, block_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """However the files are cut while they are read."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    folder = copy_of(plain)
    run("pack", folder, jobs)
    assert tree(folder) == tree(packed)


def test_blocks_of_any_cut_give_the_same_frame(tmp_path: Path) -> None:
    content = bytes(range(256)) * 3000 + bytes(500_000)

    def frame(*cuts: int) -> bytes:
        path = tmp_path / "x"
        path.unlink(missing_ok=True)
        writer = blocks.Writer(path)
        ends = [*cuts, len(content)]
        parts = (memoryview(content)[begin:end] for begin, end in zip([0, *cuts], ends, strict=True))
        archive.write_packed(parts, writer, size=len(content))
        writer.finish()
        return path.read_bytes()

    assert frame() == frame(1, 2, 500_000, 500_001, 1_000_000) == frame(131_072, 262_144)


@pytest.mark.parametrize(("task", "folder"), [("pack", "packed"), ("unpack", "plain")])
def test_nothing_to_do(task: str, folder: str, request: pytest.FixtureRequest, stamps: Stamps) -> None:
    root: Path = request.getfixturevalue(folder)
    before = stamps(root)
    with Progress(expert_bytes(root), label="", quiet=True) as progress:
        assert getattr(packing, task)(root, jobs=2, progress=progress) == manifests.load(root)
        assert (progress.bytes, progress.done_bytes) == (0, expert_bytes(root))
    assert stamps(root) == before


@pytest.mark.parametrize("task", ["pack", "unpack"])
def test_progress_counts_unpacked_bytes(task: str, plain: Path, packed: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(plain if task == "pack" else packed)
    total = sum(file.size for file in manifests.load(plain).files if file.kind == "expert")
    assert expert_bytes(folder) == total
    with Progress(total, label="", quiet=True) as progress:
        getattr(packing, task)(folder, jobs=2, progress=progress)
        assert progress.bytes == total


# Interruption.


class Killed(BaseException):
    """From here on the process does nothing more."""


CHANGES = ("open", "pwrite", "ftruncate", "fsync", "rename", "unlink")


@contextmanager
def killed(when: Callable[[int, str, tuple[Any, ...]], bool]) -> Iterator[list[int]]:
    """The first call that changes the disk and fits is not made any more, and none behind it. Calls count from 1."""
    calls, is_dead = [0], [False]

    def install(patch: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR):
                calls[0] += 1
                is_dead[0] = is_dead[0] or when(calls[0], name, arguments)
                if is_dead[0]:
                    raise Killed
            return real(*arguments, **options)

        patch.setattr(os, name, call)

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            install(patch, name)
        yield calls


def require_no_loss(folder: Path, plain: Path) -> None:
    """Every expert is here whole, in one form or the other; a manifest tells the truth."""
    for path in plain.glob("layers/*/experts/*"):
        content = path.read_bytes()
        here = folder / path.relative_to(plain)
        forms = [here.read_bytes()] if here.exists() else []
        if (other := here.with_name(here.name + ".zst")).exists():
            forms.append(zstandard.ZstdDecompressor().decompress(other.read_bytes()))
        assert content in forms
    if (folder / MANIFEST_NAME).exists():
        with Progress(0, label="", quiet=True) as progress:
            assert verify(manifests.open(folder), jobs=1, progress=progress) == []
    else:
        with pytest.raises(IncompleteError):
            manifests.open(folder)


@pytest.mark.parametrize("task", ["pack", "unpack"])
def test_killed_anywhere(task: str, plain: Path, packed: Path, tmp_path: Path, tree: Tree) -> None:
    """The same command ends it, and the other one undoes it; the bytes are those of an undisturbed run."""
    start = plain if task == "pack" else packed
    ends = {"pack": tree(packed), "unpack": tree(plain)}
    number, is_ended = 0, False
    while not is_ended:
        number += 1
        folder = shutil.copytree(start, tmp_path / str(number))
        with killed(lambda call, *_, number=number: call == number):
            try:
                run(task, folder, jobs=1)
                is_ended = True
            except Killed:
                pass
        require_no_loss(folder, plain)
        names = [task]
        if number % 3 == 0:
            names.append("unpack" if task == "pack" else "pack")
            shutil.copytree(folder, tmp_path / f"{number}-{names[1]}")
        for name, again in zip(names, (folder, tmp_path / f"{number}-{names[-1]}"), strict=False):
            with Progress(expert_bytes(again), label="", quiet=True) as progress:
                getattr(packing, name)(again, jobs=2, progress=progress)
                assert progress.done_bytes == expert_bytes(again)
            assert tree(again) == ends[name]
            shutil.rmtree(again)
    # Nine for each of the four experts, and those of journal, index and manifest.
    assert number > 50


def test_killed_twice(plain: Path, packed: Path, tmp_path: Path, tree: Tree) -> None:
    for first, second in ((12, 3), (20, 8), (31, 1), (41, 11)):
        folder = shutil.copytree(plain, tmp_path / f"{first}-{second}")
        for number in (first, second):
            with killed(lambda call, *_, number=number: call == number), pytest.raises(Killed):
                run("pack", folder, jobs=1)
            require_no_loss(folder, plain)
        run("pack", folder)
        assert tree(folder) == tree(packed)


@pytest.fixture
def halfway(plain: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A checkpoint of which two experts were packed when `pack` was killed."""
    folder = copy_of(plain)
    with killed(lambda _, name, arguments: name == "rename" and "2.safe" in str(arguments[0])), pytest.raises(Killed):
        run("pack", folder, jobs=1)
    names = ("0.safetensors.zst", "1.safetensors.zst", "2.safetensors", "2.safetensors.zst.partial", "3.safetensors")
    assert experts_of(folder) == list(names)
    return folder


def test_an_unfinished_folder(halfway: Path, plain: Path, program: Callable[..., Any]) -> None:
    assert interrupted_task(halfway) == "pack"
    assert interrupted_task(plain) is None
    assert interrupted_task(plain / "no such") is None
    result = program("manifests", "show", halfway)
    assert (result.code, result.out) == (3, "")
    result = program("reshard", "verify", halfway)
    assert (result.code, result.out) == (3, "")


def test_what_is_done_is_not_done_again(halfway: Path) -> None:
    done = halfway / "layers/1/experts/0.safetensors.zst"
    before = done.stat()
    with Progress(expert_bytes(halfway), label="", quiet=True) as progress:
        packing.pack(halfway, jobs=1, progress=progress)
        assert progress.bytes == expert_bytes(halfway) // 2
    assert done.stat() == before


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_what_was_done_and_is_lost_is_told_and_holds_up_nothing(halfway: Path, how: str) -> None:
    lost = halfway / "layers/1/experts/0.safetensors.zst"
    if how == "cut":
        os.truncate(lost, 100)
    else:
        lost.unlink()
    with pytest.raises(IntegrityError, match=r"experts/0\.safetensors: no such file.*all else is packed"):
        run("pack", halfway)
    assert len([name for name in experts_of(halfway) if name.endswith(".zst")]) == (4 if how == "cut" else 3)
    assert not (halfway / JOURNAL_NAME).exists()
    with Progress(0, label="", quiet=True) as progress:
        damage = verify(manifests.open(halfway), jobs=1, progress=progress)
    assert [finding.path for finding in damage] == ["layers/1/experts/0.safetensors"]


def test_what_was_made_and_not_recorded_is_believed_only_when_it_is_right(
    halfway: Path, packed: Path, tree: Tree
) -> None:
    """A record can be lost with a torn last line: what it vouched for may be the only copy."""
    lines = (halfway / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    (halfway / JOURNAL_NAME).write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    (halfway / "layers/1/experts/2.safetensors.zst").write_bytes(b"half of it")
    run("pack", halfway)
    assert tree(halfway) == tree(packed)


@contextmanager
def watched(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """What is made durable, renamed and removed, in order, but for temporary files that are removed."""
    calls: list[tuple[str, str]] = []

    def watch(patch: pytest.MonkeyPatch, name: str, of: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            path = Path(of(*arguments)).relative_to(folder).as_posix()
            if (name, path[-8:]) != ("unlink", ".partial"):
                calls.append((name, path))
            return real(*arguments, **options)

        patch.setattr(os, name, call)

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, "fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
        watch(patch, "rename", lambda source, _: str(source))
        watch(patch, "unlink", str)
        yield calls


END = [
    ("fsync", "."), ("fsync", f"{MANIFEST_NAME}.partial"), ("rename", f"{MANIFEST_NAME}.partial"), ("fsync", "."),
    ("unlink", ASIDE_NAME), ("unlink", JOURNAL_NAME), ("fsync", "."),
]  # fmt: skip


def test_each_step_is_durable_before_the_next(plain: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(plain)
    with watched(folder) as calls:
        run("pack", folder, jobs=1)
    file = "layers/1/experts/0.safetensors"
    assert calls[:10] == [
        ("fsync", f"{JOURNAL_NAME}.partial"), ("rename", f"{JOURNAL_NAME}.partial"), ("fsync", "."),
        ("rename", MANIFEST_NAME), ("fsync", "."),
        ("fsync", f"{file}.zst.partial"), ("rename", f"{file}.zst.partial"), ("fsync", "layers/1/experts"),
        ("fsync", JOURNAL_NAME), ("unlink", file),
    ]  # fmt: skip
    assert calls[-7:] == END


def test_what_a_killed_run_did_is_made_durable_before_it_is_relied_on(
    plain: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder, file = copy_of(plain), "layers/1/experts/0.safetensors"
    with (
        killed(lambda _, name, paths: name == "fsync" and os.readlink(f"/proc/self/fd/{paths[0]}").endswith("experts")),
        pytest.raises(Killed),
    ):
        run("pack", folder, jobs=1)
    with watched(folder) as calls:
        run("pack", folder, jobs=1)
    assert calls.index(("fsync", ".")) < calls.index(("fsync", "layers/1/experts"))
    assert (
        calls.index(("fsync", "layers/1/experts"))
        < calls.index(("fsync", JOURNAL_NAME))
        < calls.index(("unlink", file))
    )
    folder = shutil.copytree(plain, folder.with_name("at the end"))
    with killed(lambda _, name, paths: (name, paths[0]) == ("unlink", folder / ASIDE_NAME)), pytest.raises(Killed):
        run("pack", folder, jobs=1)
    with watched(folder) as calls:
        run("pack", folder, jobs=1)
    assert calls == END[3:]


# Damage.


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 16
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("position", "says"), [(20, "its header is damaged"), (4200, "gate_proj.weight' is damaged"), (None, "2 bytes")]
)
def test_a_damaged_expert_stays_as_it_is(
    plain: Path, packed: Path, copy_of: Callable[[Path], Path], tree: Tree, position: int | None, says: str
) -> None:
    """It is the only copy of what is left of it, and `repair` wants to see it."""
    folder = copy_of(plain)
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
    shutil.copy(plain / EXPERT, folder / EXPERT)
    run("pack", folder)
    assert tree(folder) == tree(packed)


@pytest.mark.parametrize("position", [0, 5, 300, -1])
def test_a_damaged_packed_expert(
    plain: Path, packed: Path, copy_of: Callable[[Path], Path], tmp_path: Path, tree: Tree, position: int
) -> None:
    folder = copy_of(packed)
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
    shutil.copy(packed / path, folder / path)
    run("unpack", folder)
    assert tree(folder) == tree(plain)


def test_an_expert_that_the_disk_does_not_give(
    plain: Path, packed: Path, copy_of: Callable[[Path], Path], tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known to be damaged."""
    folder = copy_of(plain)
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
    assert tree(folder) == tree(packed)


def test_what_is_written_wrong_is_read_back_and_found(
    plain: Path, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stores other bytes than it was given, or a compressor that errs: the plain file is still there."""
    folder = copy_of(plain)
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"{EXPERT}.zst.partial") and len(data) > 1000:
            data = bytes(data[:1000]) + bytes([data[1000] ^ 1]) + bytes(data[1001:])
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(IntegrityError, match=r"experts/2.*read back wrong"):
            run("pack", folder, jobs=1)
    assert (folder / EXPERT).read_bytes() == (plain / EXPERT).read_bytes()
    assert not (folder / f"{EXPERT}.zst").exists()
    run("pack", folder)


def test_every_flipped_bit_of_a_frame_is_found(packed: Path, plain: Path, tmp_path: Path) -> None:
    """Or makes no difference: some bits of a frame say nothing. Nothing else is raised."""
    raw, content = (packed / f"{EXPERT}.zst").read_bytes(), (plain / EXPERT).read_bytes()
    path = tmp_path / "x.zst"
    unharmed, messages = 0, set()
    for position in (*range(40), *range(40, len(raw), 37), *range(len(raw) - 8, len(raw))):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << position % 8]) + raw[position + 1 :])
        try:
            found = b"".join(map(bytes, archive.unpack_blocks(path, size=len(content))))
        except IntegrityError as error:
            messages.add(str(error).split(":")[0])
        else:
            assert found == content
            unharmed += 1
    assert messages == {str(path)}
    assert unharmed < 5


@pytest.mark.parametrize("difference", [-1, 1, 5000])
def test_another_size_than_promised(packed: Path, plain: Path, difference: int) -> None:
    size = (plain / EXPERT).stat().st_size + difference
    with pytest.raises(IntegrityError, match=r"zst: (its zstd frame ends|unpacks to more)"):
        list(archive.unpack_blocks(packed / f"{EXPERT}.zst", size=size))


def test_a_cut_frame(packed: Path, plain: Path, tmp_path: Path) -> None:
    raw = (packed / f"{EXPERT}.zst").read_bytes()
    for length in (0, 3, 10, 100, len(raw) // 2, len(raw) - 5):
        (tmp_path / "x").write_bytes(raw[:length])
        with pytest.raises(IntegrityError, match="x: "):
            list(archive.unpack_blocks(tmp_path / "x", size=(plain / EXPERT).stat().st_size))


def test_a_frame_that_would_fill_memory(tmp_path: Path) -> None:
    """64 MB of zeros in some kilobytes, of which the manifest promises a few bytes: no more than these are made."""
    bomb = tmp_path / "bomb.zst"
    bomb.write_bytes(zstandard.ZstdCompressor().compress(bytes(64_000_000)))
    content = archive.unpack_blocks(bomb, size=1000)
    assert bytes(next(content)) == bytes(1000)
    with pytest.raises(IntegrityError, match=r"bomb\.zst: unpacks to more bytes"):
        next(content)
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=27)).compressobj()
    bomb.write_bytes(wide.compress(bytes(1000)) + wide.flush())
    with pytest.raises(IntegrityError, match=r"bomb\.zst: damaged zstd frame: .*memory"):
        list(archive.unpack_blocks(bomb, size=1000))
    with pytest.raises(ResourceError, match="reshard unpack"):
        archive.UnpackingReader(bomb, archive.MAX_EXPERT_BYTES + 1)


def test_an_empty_file_unpacks_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(archive.pack(b""))
    assert list(archive.unpack_blocks(tmp_path / "x", size=0)) == []


def test_each_expert_is_unpacked_once_for_a_shard(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight lies at the begin of its file and its scale at the end, and a shard has one behind the other."""
    read: list[str] = []
    real = archive.unpack_blocks

    def counted(path: Path, *, size: int) -> Iterator[memoryview]:
        read.append(path.name)
        return real(path, size=size)

    monkeypatch.setattr(archive, "unpack_blocks", counted)
    with Progress(0, label="", quiet=True) as progress:
        check(manifests.open(packed), jobs=1, progress=progress)
    assert sorted(set(read)) == experts_of(packed)
    # One that is cut across two shards is wanted twice.
    assert len(read) <= len(set(read)) + 2


# What is refused, and what is short.


def test_a_full_disk(
    plain: Path, packed: Path, copy_of: Callable[[Path], Path], tree: Tree, fail_call: Callable[..., Any]
) -> None:
    folder = copy_of(plain)
    with pytest.MonkeyPatch.context() as patch:
        real, calls = os.pwrite, [0]

        def pwrite(*arguments: Any) -> int:
            calls[0] += 1
            if calls[0] > 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(ResourceError, match="no space left"):
            run("pack", folder, jobs=1)
    require_no_loss(folder, plain)
    assert not list(folder.rglob("*.partial"))
    run("pack", folder)
    assert tree(folder) == tree(packed)


@pytest.mark.parametrize("task", ["pack", "unpack"])
def test_too_little_room_is_said_before_anything_is_written(
    task: str, plain: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, stamps: Stamps
) -> None:
    root = plain if task == "pack" else packed
    before = stamps(root)
    monkeypatch.setattr(destination, "free_bytes", lambda _: 10_000)
    with pytest.raises(ResourceError, match="nothing was written"):
        run(task, root)
    assert stamps(root) == before


def test_room_for_one_expert_of_each_job_is_asked_for(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def check_room(_: Path, needed: int) -> None:
        asked.append(needed)
        raise ResourceError("enough seen")

    monkeypatch.setattr(packing, "check_room", check_room)
    for jobs in (1, 2, 3, 9):
        with pytest.raises(ResourceError):
            run("pack", plain, jobs)
    size = (plain / EXPERT).stat().st_size
    steps = [later - sooner for sooner, later in pairwise(asked)]
    assert size <= steps[0] == steps[1] == steps[2] <= size * 1.01 + 4096


def test_one_at_a_time(plain: Path, stamps: Stamps) -> None:
    before = stamps(plain)
    with lock_folder(plain), pytest.raises(LockedError):
        run("pack", plain)
    assert stamps(plain) == before


def test_what_is_no_resharded_checkpoint(v2_folder: Path, tmp_path: Path) -> None:
    for folder in (v2_folder, tmp_path, tmp_path / "no such", v2_folder / "config.json"):
        for task in ("pack", "unpack"):
            with pytest.raises(SourceNotFoundError, match="resharded checkpoint"):
                run(task, folder)
    assert not (tmp_path / "no such").exists()


@pytest.mark.parametrize("task", ["run", "restore"])
def test_another_interrupted_command_comes_first(plain: Path, copy_of: Callable[[Path], Path], task: str) -> None:
    folder = copy_of(plain)
    packing.Journal.create(folder, {"task": task}).close()
    with pytest.raises(ManifestError, match=f"`reshard {task}` was interrupted here; finish that first"):
        run("pack", folder)
    assert interrupted_task(folder) is None
    assert (folder / JOURNAL_NAME).exists()


def test_a_folder_that_restore_takes_apart(plain: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(plain)
    (folder / MANIFEST_NAME).rename(folder / ASIDE_NAME)
    with pytest.raises(IncompleteError, match="restore --consume"):
        run("pack", folder)


def test_links_and_strangers_are_refused(
    plain: Path, copy_of: Callable[[Path], Path], tmp_path: Path, stamps: Stamps
) -> None:
    folder = copy_of(plain)
    (folder / f"{EXPERT}.zst").write_bytes(b"somebody's")
    before = stamps(folder)
    with pytest.raises(ToolkitError, match=r"2\.safetensors\.zst: is in the way"):
        run("pack", folder)
    assert stamps(folder) == before
    (folder / f"{EXPERT}.zst").unlink()
    (folder / EXPERT).rename(folder / "elsewhere")
    (folder / EXPERT).symlink_to(folder / "elsewhere")
    before = stamps(folder)
    with pytest.raises(ToolkitError, match=r"2\.safetensors: is a link"):
        run("pack", folder)
    assert stamps(folder) == before


def test_a_journal_that_we_did_not_write(halfway: Path) -> None:
    contents = packing.read_journal(halfway)
    assert contents is not None
    journal = contents.reopen()
    journal.append({"file": "../../etc/passwd", "size": 3, "stored_sha256": None})
    journal.close()
    with pytest.raises(ManifestError, match="a record has not the form of a pack's"):
        run("pack", halfway)


def test_another_manifest_than_was_set_aside(halfway: Path, packed: Path) -> None:
    shutil.copy(packed / MANIFEST_NAME, halfway / ASIDE_NAME)
    with pytest.raises(ManifestError, match="is not the manifest that was set aside"):
        run("pack", halfway)
    (halfway / ASIDE_NAME).unlink()
    for task in ("pack", "unpack"):
        with pytest.raises(IntegrityError, match="has neither"):
            run(task, halfway)
    with pytest.raises(IntegrityError, match="has neither"):
        expert_bytes(halfway)


# What others say of a packed checkpoint.


def test_a_packed_expert_is_not_mapped(packed: Path) -> None:
    checkpoint = manifests.open(packed)
    assert len(checkpoint.unreadable()) == 4
    with pytest.raises(UnsupportedModelError, match=r"experts/2\.safetensors\.zst.*cannot be mapped; `reshard unpack`"):
        checkpoint.expert(1, 2)
    place = checkpoint.locate("model.layers.1.mlp.experts.2.up_proj.weight")
    assert place is not None
    assert (place.codec, place.file) == ("zstd", f"{EXPERT}.zst")
    assert checkpoint.dense(1)


def test_inspection_shows_both_sizes(packed: Path, plain: Path, program: Callable[..., Any]) -> None:
    shown = program("manifests", "show", packed, "--json").json
    files = [file for file in manifests.load(packed).files if file.codec == "zstd"]
    assert shown["packed_files"] == len(files) == 4
    assert shown["packed_bytes"] == sum((packed / file.path).stat().st_size for file in files)
    assert shown["unpacked_bytes"] == expert_bytes(plain)
    assert "packed                  4   " in program("manifests", "show", packed).out
    assert "packed" not in program("manifests", "show", plain).out
    assert program("manifests", "show", plain, "--json").json["packed_files"] == 0
    rows = {row["name"]: row for row in program("manifests", "ls", packed, "--json").json}
    assert {row["codec"] for name, row in rows.items() if ".experts." in name} == {"zstd"}
    assert {row["codec"] for name, row in rows.items() if ".experts." not in name} == {"none"}
    result = program("manifests", "ls", packed, "--expert", 2)
    assert result.err == "note: byte ranges in files that end in .zst are those of the unpacked file\n"
    assert program("manifests", "ls", packed, "--layer", 0).err == ""
    checked = program("manifests", "check", packed)
    assert checked.code == 0
    assert checked.out.endswith("; 4 of them are packed, only their sizes were looked at\n")
    assert program("manifests", "check", plain).out.endswith("sizes and headers are right\n")
    same = program("manifests", "diff", packed, plain)
    assert (same.code, same.out, same.err) == (0, "", "")
