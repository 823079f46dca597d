"""Starting again takes away what an interrupted command left; never the only copy of anything, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests.errors import IntegrityError, LockedError, SourceNotFoundError, ToolkitError
from manifests.schema import Selection
from reshard import run as run_module
from reshard.discard import discard
from reshard.lock import lock_folder
from reshard.progress import Progress
from reshard.restore import open_restored, restore
from reshard.verify import verify

Tree = Callable[[Path], dict[str, str]]
Stop = Callable[[int], AbstractContextManager[None]]
StopAt = Callable[[Any, str], AbstractContextManager[None]]
Reshard = Callable[..., Path]
JOURNAL = "reshard-journal.jsonl"
PART = Selection(layers=(0,))


def rebuild(root: Path, out: Path, **options: bool) -> None:
    with Progress(0, label="", quiet=True) as progress:
        restore(open_restored(root, out), out, jobs=1, progress=progress, **options)


def damage_of(root: Path) -> list[Any]:
    with Progress(0, label="", quiet=True) as progress:
        return verify(manifests.open(root), jobs=1, progress=progress)


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_what_a_run_left_is_removed(
    shards: int, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with stop_after(shards):
        reshard_folder(v2_folder, out, jobs=1)
    discard(v2_folder, out)
    assert os.listdir(out) == []
    assert tree(reshard_folder(v2_folder, out)) == tree(v2_resharded)


@pytest.mark.parametrize("missing", ["the folder", "a shard"])
def test_nothing_goes_that_could_not_be_made_again(
    missing: str, v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    """A mistyped folder must not cost the hours that a run took."""
    out, source = tmp_path / "out", v2_copy
    with stop_after(2):
        reshard_folder(v2_copy, out, jobs=1)
    if missing == "the folder":
        source = tmp_path / "nowhere"
    else:
        (v2_copy / "model-00003-of-000004.safetensors").unlink()
    before = tree(tmp_path)
    with pytest.raises(SourceNotFoundError, match=f"{source}: has no model-.*; nothing was discarded"):
        discard(source, out)
    assert tree(tmp_path) == before


def test_what_was_restored_stays_without_what_it_was_restored_from(
    v2_resharded: Path, tmp_path: Path, stop_after: Stop, tree: Tree
) -> None:
    out = tmp_path / "back"
    with stop_after(2):
        rebuild(v2_resharded, out)
    before = tree(tmp_path)
    with pytest.raises(SourceNotFoundError, match=r"nowhere: has no manifest\.json, from which .* was being made"):
        discard(tmp_path / "nowhere", out)
    assert tree(tmp_path) == before


def test_without_a_journal_nothing_happens(
    v2_folder: Path, v2_resharded: Path, tmp_path: Path, stamps: Callable[[Path], Any]
) -> None:
    (tmp_path / "mine").write_text("mine")
    for folder in (v2_resharded, tmp_path, tmp_path / "nowhere"):
        before = stamps(folder) if folder.exists() else None
        discard(v2_folder, folder)
        assert (stamps(folder) if folder.exists() else None) == before


def test_another_source_does_not_matter_when_nothing_was_freed(
    v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop
) -> None:
    """That is what --discard is for."""
    with stop_after(2):
        reshard_folder(v2_copy, tmp_path / "out", jobs=1)
    for path in v2_copy.glob("model-*"):
        path.write_bytes(b"another one")
    discard(v2_copy, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_never_when_a_part_of_the_source_was_freed(
    shards: int, v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree, stop_at: StopAt,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    if shards < 4:
        with stop_after(shards):
            reshard_folder(v2_copy, out, jobs=1, consume=True)
    else:
        with stop_at(run_module, "save"):
            reshard_folder(v2_copy, out, jobs=1, consume=True)
    before = tree(tmp_path)
    for source in (v2_copy, tmp_path / "nowhere"):
        with pytest.raises(ToolkitError, match=r"--consume may have freed model-00001.*give the same command without"):
            discard(source, out)
        assert tree(tmp_path) == before
    assert tree(reshard_folder(v2_copy, out, consume=True)) == tree(v2_resharded)


def test_a_consuming_run_that_freed_nothing_yet(
    v2_copy: Path, v2_folder: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    with stop_after(0):
        reshard_folder(v2_copy, tmp_path / "out", jobs=1, consume=True)
    discard(v2_copy, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
    assert tree(v2_copy) == tree(v2_folder)


def test_a_run_that_began_without_consuming(
    v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    """The disk was full, and the same run went on with --consume: from then on nothing may be thrown away."""
    out = tmp_path / "out"
    with stop_after(1):
        reshard_folder(v2_copy, out, jobs=1)
    with stop_after(1):
        reshard_folder(v2_copy, out, jobs=1, consume=True)
    assert len(list(v2_copy.glob("model-*.safetensors"))) == 2
    before = tree(tmp_path)
    with pytest.raises(ToolkitError, match="--consume may have freed"):
        discard(v2_copy, out)
    with pytest.raises(ToolkitError, match="--consume may have freed"):
        discard(v2_copy, out)
    assert tree(tmp_path) == before
    with stop_after(0):
        reshard_folder(v2_copy, out, jobs=1)  # and back without it
    assert tree(reshard_folder(v2_copy, out)) == tree(v2_resharded)


def test_another_models_source_is_no_proof(
    v2_copy: Path, v2_folder: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    """Its shards have the same names, sizes and headers: V3 and R1 do."""
    other = shutil.copytree(v2_folder, tmp_path / "other")
    for path in other.glob("model-*.safetensors"):
        os.utime(path, ns=(5, 5))
    with stop_after(2):
        reshard_folder(v2_copy, tmp_path / "out", jobs=1, consume=True)
    before = tree(tmp_path)
    with pytest.raises(ToolkitError, match=r"other/model-00001.*: is not the file that was read into .*out"):
        discard(other, tmp_path / "out")
    assert tree(tmp_path) == before


def test_while_it_is_still_running(
    v2_folder: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    with stop_after(2):
        reshard_folder(v2_folder, tmp_path / "out", jobs=1)
    before = tree(tmp_path)
    with lock_folder(tmp_path / "out"), pytest.raises(LockedError):
        discard(v2_folder, tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("consume", [False, True])
def test_a_damaged_first_line_is_no_permission(
    consume: bool, v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    with stop_after(2):
        reshard_folder(v2_copy, tmp_path / "out", jobs=1, consume=consume)
    journal = tmp_path / "out" / JOURNAL
    raw = bytearray(journal.read_bytes())
    raw[100] ^= 1
    journal.write_bytes(raw)
    before = tree(tmp_path)
    with pytest.raises(IntegrityError, match="its first line is damaged"):
        discard(v2_copy, tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_line_that_is_damaged_further_on(
    v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    """It may have said that the source is used up, so the source must prove itself."""
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_copy, out, jobs=1)
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    (out / JOURNAL).write_bytes(lines[0] + b"{}\n" + lines[2])
    shard = next(iter(sorted(v2_copy.glob("model-*.safetensors"))))
    shard.rename(tmp_path / "away")
    before = tree(tmp_path)
    with pytest.raises(ToolkitError, match="--consume may have freed"):
        discard(v2_copy, out)
    assert tree(tmp_path) == before
    (tmp_path / "away").rename(shard)
    discard(v2_copy, out)
    assert os.listdir(out) == []


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_what_was_widened_survives(
    shards: int, v2_folder: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    out = reshard_folder(v2_folder, tmp_path / "out", PART)
    before = tree(out)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    with stop_after(shards):
        reshard_folder(v2_folder, out, jobs=1)
    assert len(tree(out)) > len(before) + 2
    discard(v2_folder, out)
    assert (out / "notes" / "mine.txt").read_text() == "mine"
    shutil.rmtree(out / "notes")
    assert {path: what for path, what in tree(out).items() if what != "folder"} == {
        path: what for path, what in before.items() if what != "folder"
    }
    assert damage_of(out) == []


@pytest.mark.parametrize("where", ["write_index", "save", "end_journal"])
def test_what_was_widened_survives_until_the_last_moment(
    where: str, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree,
    stop_at: StopAt,
) -> None:  # fmt: skip
    """The old manifest stands aside then; behind the new one it is the new one that survives."""
    out = reshard_folder(v2_folder, tmp_path / "out", PART)
    before = tree(out)
    with stop_at(run_module, where):
        reshard_folder(v2_folder, out)
    assert (out / "manifest.json.aside").exists()
    discard(v2_folder, out)
    expected = tree(v2_resharded) if where == "end_journal" else before
    assert {path: what for path, what in tree(out).items() if what != "folder"} == {
        path: what for path, what in expected.items() if what != "folder"
    }
    assert damage_of(out) == []


def test_what_a_restore_left_is_removed(v2_resharded: Path, v2_folder: Path, tmp_path: Path, stop_after: Stop) -> None:
    out = tmp_path / "back"
    with stop_after(2):
        rebuild(v2_resharded, out)
    discard(v2_resharded, out)
    assert os.listdir(out) == []
    rebuild(v2_resharded, out)
    assert (out / "config.json").read_bytes() == (v2_folder / "config.json").read_bytes()


@pytest.mark.parametrize("first", [{"consume": True}, {}], ids=["at once", "later"])
def test_never_when_a_part_of_the_checkpoint_was_freed(
    first: dict[str, bool], v2_resharded: Path, tmp_path: Path, stop_after: Stop, tree: Tree
) -> None:
    root, out = shutil.copytree(v2_resharded, tmp_path / "resharded"), tmp_path / "back"
    with stop_after(1):
        rebuild(root, out, **first)
    with stop_after(1):
        rebuild(root, out, consume=True)
    before = tree(tmp_path)
    for source in (root, tmp_path / "nowhere"):
        with pytest.raises(ToolkitError, match=r"--consume may have freed manifest\.json"):
            discard(source, out)
    with pytest.raises(ToolkitError, match="is not the file that was read"):
        discard(other_checkpoint(v2_resharded, tmp_path), out)
    shutil.rmtree(tmp_path / "other")
    assert tree(tmp_path) == before
    rebuild(root, out, consume=True)
    assert not root.exists()


def other_checkpoint(resharded: Path, tmp_path: Path) -> Path:
    """Another folder with a whole manifest."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_bytes((resharded / "manifest.json").read_bytes() + b"\n")
    return tmp_path / "other"


def test_a_restore_that_freed_nothing_yet(v2_resharded: Path, tmp_path: Path, stop_after: Stop, tree: Tree) -> None:
    """It had not even set the manifest aside."""
    root, out = shutil.copytree(v2_resharded, tmp_path / "resharded"), tmp_path / "back"
    with stop_after(0):
        rebuild(root, out)
    discard(root, out)
    assert os.listdir(out) == []
    assert tree(root) == tree(v2_resharded)


def test_a_kill_while_it_discards_can_be_discarded_again(
    v2_folder: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, stop_at: StopAt
) -> None:
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_folder, out, jobs=1)
    with stop_at(shutil, "rmtree"):
        discard(v2_folder, out)
    assert (out / JOURNAL).exists()
    discard(v2_folder, out)
    assert os.listdir(out) == []
