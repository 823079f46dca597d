"""Packing and unpacking stopped anywhere: nothing is lost, and either command goes on from there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard

import manifests
from manifests.errors import (
    IncompleteError,
    IntegrityError,
    ManifestError,
    ResourceError,
)
from manifests.paths import ASIDE_NAME, JOURNAL_NAME, MANIFEST_NAME
from manifests.schema import Selection
from reshard import blocks, packing
from reshard.journal import read_journal
from reshard.packing import expert_bytes, interrupted_task
from reshard.progress import Progress
from reshard.verify import verify

Tree = Callable[[Path], dict[str, str]]

EXPERT = "layers/1/experts/2.safetensors"


def run(task: str, folder: Path, jobs: int = 2) -> Any:
    with Progress(0, label="", quiet=True) as progress:
        return getattr(packing, task)(folder, jobs=jobs, progress=progress)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: shutil.copytree(folder, tmp_path / f"{folder.name}-copy", dirs_exist_ok=False)


def experts_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("layers/*/experts/*"))


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


def require_no_loss(folder: Path, v2_resharded: Path) -> None:
    """Every expert is here whole, in one form or the other; a manifest tells the truth."""
    for path in v2_resharded.glob("layers/*/experts/*"):
        content = path.read_bytes()
        here = folder / path.relative_to(v2_resharded)
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
def test_killed_anywhere(task: str, v2_resharded: Path, v2_packed: Path, tmp_path: Path, tree: Tree) -> None:
    """The same command ends it, and the other one undoes it; the bytes are those of an undisturbed run."""
    start = v2_resharded if task == "pack" else v2_packed
    ends = {"pack": tree(v2_packed), "unpack": tree(v2_resharded)}
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
        require_no_loss(folder, v2_resharded)
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


def test_killed_twice(v2_resharded: Path, v2_packed: Path, tmp_path: Path, tree: Tree) -> None:
    for first, second in ((12, 3), (20, 8), (31, 1), (41, 11)):
        folder = shutil.copytree(v2_resharded, tmp_path / f"{first}-{second}")
        for number in (first, second):
            with killed(lambda call, *_, number=number: call == number), pytest.raises(Killed):
                run("pack", folder, jobs=1)
            require_no_loss(folder, v2_resharded)
        run("pack", folder)
        assert tree(folder) == tree(v2_packed)


def test_a_full_disk(
    v2_resharded: Path, v2_packed: Path, copy_of: Callable[[Path], Path], tree: Tree, fail_call: Callable[..., Any]
) -> None:
    folder = copy_of(v2_resharded)
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
    require_no_loss(folder, v2_resharded)
    assert not list(folder.rglob("*.partial"))
    run("pack", folder)
    assert tree(folder) == tree(v2_packed)


@pytest.fixture
def halfway(v2_resharded: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A checkpoint of which two experts were packed when `pack` was killed."""
    folder = copy_of(v2_resharded)
    with killed(lambda _, name, arguments: name == "rename" and "2.safe" in str(arguments[0])), pytest.raises(Killed):
        run("pack", folder, jobs=1)
    names = ("0.safetensors.zst", "1.safetensors.zst", "2.safetensors", "2.safetensors.zst.partial", "3.safetensors")
    assert experts_of(folder) == list(names)
    return folder


def test_an_unfinished_folder(halfway: Path, v2_resharded: Path, program: Callable[..., Any]) -> None:
    assert interrupted_task(halfway) == "pack"
    assert interrupted_task(v2_resharded) is None
    assert interrupted_task(v2_resharded / "no such") is None
    result = program("manifests", "show", halfway)
    assert (result.code, result.out) == (3, "")
    result = program("reshard", "verify", halfway)
    assert (result.code, result.out) == (3, "")


@pytest.mark.parametrize("asks", [["--dry-run"], ["--discard"]], ids=" ".join)
def test_run_does_not_go_on_with_packing_when_it_may_not(
    asks: list[str], halfway: Path, v2_folder: Path, program: Callable[..., Any], tree: Callable[[Path], Any]
) -> None:
    before = tree(halfway)
    result = program("reshard", "run", v2_folder, halfway, *asks)
    assert (result.code != 0, result.out, "`reshard pack` was interrupted here" in result.err) == (True, "", True)
    assert tree(halfway) == before
    result = program("reshard", "run", v2_folder.parent / "nowhere", halfway)
    assert (result.code != 0, tree(halfway)) == (True, before)
    assert program("reshard", "run", v2_folder, halfway).code == 0
    assert interrupted_task(halfway) is None


def test_run_never_takes_a_finished_packing_for_what_it_was_asked_for(
    v2_folder: Path, v3_folder: Path, tmp_path: Path, program: Callable[..., Any], reshard_folder: Callable[..., Path]
) -> None:
    """All that was here is packed then; but it may be a part, or another model's."""
    folder = reshard_folder(v2_folder, tmp_path / "part", Selection(layers=(1,)))

    def interrupt() -> None:
        with killed(lambda _, name, arguments: name == "rename" and "2.safe" in str(arguments[0])):  # noqa: SIM117
            with pytest.raises(Killed):
                run("pack", folder, jobs=1)
        assert interrupted_task(folder) == "pack"

    interrupt()
    result = program("reshard", "run", v2_folder, folder)
    assert (result.code, "is packed; `reshard unpack` it before adding to it" in result.err) == (1, True)
    run("unpack", folder)
    interrupt()
    result = program("reshard", "run", v3_folder, folder)
    assert (result.code, "holds another checkpoint than" in result.err) == (1, True)
    (tmp_path / "empty").mkdir()
    assert program("reshard", "run", tmp_path / "empty", folder).code == 10
    run("unpack", folder)
    interrupt()
    result = program("reshard", "run", v2_folder, folder, "--layers", "1", "--codec", "zstd", "--json")
    end = json.loads(result.out.splitlines()[-1])
    assert (result.code, end["packed_files"], end["moved_bytes"], end["files"]) == (0, 4, 0, 7)


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


@pytest.mark.parametrize("task", ["pack", "unpack"])
@pytest.mark.parametrize("how", ["half of it", "a wrong checksum"])
def test_what_was_made_and_not_recorded_is_believed_only_when_it_is_right(
    halfway: Path, v2_resharded: Path, v2_packed: Path, tree: Tree, how: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record can be lost with a torn last line: what it vouched for may be the only copy."""
    lines = (halfway / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    (halfway / JOURNAL_NAME).write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    raw = (v2_packed / f"{EXPERT}.zst").read_bytes()
    wrong = raw[:500] if how == "half of it" else raw[:-1] + bytes([raw[-1] ^ 1])
    (halfway / f"{EXPERT}.zst").write_bytes(wrong)
    # The checksum is read last, by itself.
    monkeypatch.setattr(blocks, "BLOCK_BYTES", len(raw) - 4)
    run(task, halfway)
    assert tree(halfway) == tree(v2_packed if task == "pack" else v2_resharded)


def test_a_journal_that_we_did_not_write(halfway: Path) -> None:
    contents = read_journal(halfway)
    assert contents is not None
    journal = contents.reopen()
    journal.append({"file": "../../etc/passwd", "size": 3, "stored_sha256": None})
    journal.close()
    with pytest.raises(ManifestError, match="a record has not the form of a pack's"):
        run("pack", halfway)


def test_another_manifest_than_was_set_aside(halfway: Path, v2_packed: Path) -> None:
    shutil.copy(v2_packed / MANIFEST_NAME, halfway / ASIDE_NAME)
    with pytest.raises(ManifestError, match="is not the manifest that was set aside"):
        run("pack", halfway)
    (halfway / ASIDE_NAME).unlink()
    for task in ("pack", "unpack"):
        with pytest.raises(IntegrityError, match="has neither"):
            run(task, halfway)
    with pytest.raises(IntegrityError, match="has neither"):
        expert_bytes(halfway)


@contextmanager
def watched(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """What is made durable, renamed and removed, in order, but for temporary files that are removed."""
    calls: list[tuple[str, str]] = []

    def watch(patch: pytest.MonkeyPatch, name: str, of: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            path = Path(of(*arguments))
            # The way to the folder is made durable on every run, and is no part of what is looked at here.
            if path.is_relative_to(folder) and (name, path.suffix) != ("unlink", ".partial"):
                calls.append((name, path.relative_to(folder).as_posix()))
            return real(*arguments, **options)

        patch.setattr(os, name, call)

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, "fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
        watch(patch, "rename", lambda source, _: str(source))
        watch(patch, "unlink", str)
        yield calls


END = [
    ("fsync", "."), ("fsync", f"{MANIFEST_NAME}.partial"), ("rename", f"{MANIFEST_NAME}.partial"), ("fsync", "."),
    ("unlink", ASIDE_NAME), ("fsync", "."), ("unlink", JOURNAL_NAME), ("fsync", "."),
]  # fmt: skip


def test_each_step_is_durable_before_the_next(v2_resharded: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(v2_resharded)
    with watched(folder) as calls:
        run("pack", folder, jobs=1)
    file = "layers/1/experts/0.safetensors"
    assert calls[:11] == [
        ("fsync", "."), ("fsync", f"{JOURNAL_NAME}.partial"), ("rename", f"{JOURNAL_NAME}.partial"), ("fsync", "."),
        ("rename", MANIFEST_NAME), ("fsync", "."),
        ("fsync", f"{file}.zst.partial"), ("rename", f"{file}.zst.partial"), ("fsync", "layers/1/experts"),
        ("fsync", JOURNAL_NAME), ("unlink", file),
    ]  # fmt: skip
    assert calls[-8:] == END


def test_what_a_killed_run_did_is_made_durable_before_it_is_relied_on(
    v2_resharded: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder, file = copy_of(v2_resharded), "layers/1/experts/0.safetensors"
    with (
        killed(lambda _, name, paths: name == "fsync" and os.readlink(f"/proc/self/fd/{paths[0]}").endswith("experts")),
        pytest.raises(Killed),
    ):
        run("pack", folder, jobs=1)
    with watched(folder) as calls:
        run("pack", folder, jobs=1)
    steps = (
        ("fsync", "."), ("fsync", f"{file}.zst"), ("fsync", "layers/1/experts"), ("fsync", JOURNAL_NAME),
        ("unlink", file),
    )  # fmt: skip
    places = [calls.index(step) for step in steps]
    assert places == sorted(places)
    folder = shutil.copytree(v2_resharded, folder.with_name("at the end"))
    with killed(lambda _, name, paths: (name, paths[0]) == ("unlink", folder / ASIDE_NAME)), pytest.raises(Killed):
        run("pack", folder, jobs=1)
    with watched(folder) as calls:
        run("pack", folder, jobs=1)
    assert calls == END[3:]
