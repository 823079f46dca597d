"""Stopped behind any shard, the same command ends as one that was never stopped, and reads nothing twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests.errors import IncompleteError, IntegrityError, ManifestError, ResourceError, ToolkitError
from manifests.schema import Selection
from reshard import consume as consume_module
from reshard import restore as restore_module
from reshard import run as run_module
from reshard.blocks import Reader
from reshard.earlier import find_earlier
from reshard.plan import make_plan
from reshard.progress import Progress
from reshard.restore import clean_up_restored, open_restored, restore
from reshard.run import Outcome, reshard_checkpoint
from reshard.source import read_source

Tree = Callable[[Path], dict[str, str]]
Stop = Callable[[int], AbstractContextManager[None]]
StopAt = Callable[[Any, str], AbstractContextManager[None]]
Reshard = Callable[..., Path]
FOREIGN = ".cache", "pytorch_model.bin", "consolidated.safetensors", "figures/.git"
EMBED = "model/embed.safetensors"
SHARDS = [f"model-0000{number}-of-000004.safetensors" for number in (1, 2, 3, 4)]
JOURNAL = "reshard-journal.jsonl"
CUT = "layers/1/experts/2.safetensors"
"""An expert of which the third shard has two tensors and the fourth the last."""
WAYS = [False, True]


def go_on(source: Path, out: Path, *, jobs: int = 1, **options: bool) -> Outcome:
    earlier = find_earlier(source, out)
    found = read_source(source, earlier.freed)
    with Progress(0, label="", quiet=True) as progress:
        plan = make_plan(found, earlier.widen(Selection()))
        return reshard_checkpoint(found, plan, out, jobs=jobs, progress=progress, **options)


def rebuild(root: Path, out: Path, *, jobs: int = 1, **options: bool) -> None:
    """As the command does it."""
    if clean_up_restored(root, out):
        return
    with Progress(0, label="", quiet=True) as progress:
        restore(open_restored(root, out), out, jobs=jobs, progress=progress, **options)


def own(found: dict[str, str]) -> dict[str, str]:
    return {path: what for path, what in found.items() if not path.startswith(FOREIGN)}


def shards_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def flip(path: Path, position: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that were read of each file, by its name."""
    counts: dict[str, int] = {}
    real = Reader.read

    def counted(self: Reader, *arguments: Any) -> Any:
        block, is_hole = real(self, *arguments)
        counts[self._path.name] = counts.get(self._path.name, 0) + len(block)
        return block, is_hole

    monkeypatch.setattr(Reader, "read", counted)
    return counts


@pytest.mark.parametrize("consume", WAYS)
@pytest.mark.parametrize("shards", range(5))
def test_a_run_goes_on_behind_every_shard(
    shards: int, consume: bool, v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard,
    stop_after: Stop, stop_at: StopAt, tree: Tree, read: dict[str, int],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with stop_after(shards) if shards < 4 else stop_at(run_module, "write_index"):
        reshard_folder(v2_copy, out, jobs=1, consume=consume)
    assert len((out / JOURNAL).read_text().splitlines()) == 1 + shards
    assert shards_of(v2_copy) == (SHARDS[shards:] if consume else SHARDS)
    with pytest.raises(IncompleteError):
        manifests.open(out)
    read.clear()
    outcome = go_on(v2_copy, out, consume=consume)
    assert tree(out) == tree(v2_resharded)
    assert shards_of(v2_copy) == ([] if consume else SHARDS)
    assert not set(read) & set(SHARDS[:shards])
    assert outcome.kept_bytes + outcome.moved_bytes == sum(
        tensor.size for file in manifests.load(out).files for tensor in file.tensors
    )
    assert (outcome.kept_bytes > 0) is (shards > 0)
    assert (outcome.moved_bytes > 0) is (shards < 4)


@pytest.mark.parametrize("consume", WAYS)
def test_stopped_again_and_again(
    consume: bool, v3_copy: Path, v3_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree,
) -> None:  # fmt: skip
    """Every time a few shards further, with several under way."""
    out = tmp_path / "out"
    for _ in range(6):
        with stop_after(7):
            reshard_folder(v3_copy, out, jobs=3, consume=consume)
    assert tree(reshard_folder(v3_copy, out, consume=consume)) == tree(v3_resharded)


@pytest.mark.parametrize(
    ("shards", "consume"), [(shards, way) for shards in range(5) for way in WAYS if shards < 4 or way]
)
def test_a_restore_goes_on_behind_every_shard(
    shards: int, consume: bool, v2_folder: Path, v2_resharded: Path, tmp_path: Path, stop_after: Stop, stop_at: StopAt,
    tree: Tree, read: dict[str, int],
) -> None:  # fmt: skip
    root, out = shutil.copytree(v2_resharded, tmp_path / "resharded"), tmp_path / "back"
    if shards < 4:
        with stop_after(shards):
            rebuild(root, out, consume=consume)
    else:
        with stop_at(restore_module, "_remove_rest"):
            rebuild(root, out, consume=True)
    kept = shards_of(out)
    inodes = {name: (out / name).stat().st_ino for name in kept}
    with pytest.raises(IncompleteError):
        manifests.open(out)
    if consume and shards:
        with pytest.raises(IncompleteError):
            manifests.open(root)
    read.clear()
    rebuild(root, out, consume=consume)
    assert tree(out) == own(tree(v2_folder))
    recorded = SHARDS[:shards]  # one more may have its name already
    assert all((out / name).stat().st_ino == inodes[name] for name in recorded)
    if consume:
        assert not root.exists()
    else:
        assert tree(root) == tree(v2_resharded)
        # Nothing that is restored is read once more.
        assert not set(read) & set(recorded)


@pytest.mark.parametrize("consume", WAYS)
def test_a_restore_that_is_stopped_again_and_again(
    consume: bool, v3_folder: Path, resharded_copy: Path, tmp_path: Path, stop_after: Stop, tree: Tree
) -> None:
    for _ in range(6):
        with stop_after(7):
            rebuild(resharded_copy, tmp_path / "back", jobs=3, consume=consume)
    rebuild(resharded_copy, tmp_path / "back", jobs=3, consume=consume)
    assert tree(tmp_path / "back") == own(tree(v3_folder))
    assert resharded_copy.exists() is not consume


@pytest.mark.parametrize("number", range(1, 5))
def test_stopped_between_the_record_and_the_freeing(
    number: int, v2_copy: Path, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard,
    tree: Tree, monkeypatch: pytest.MonkeyPatch, stop_after: Stop,
) -> None:  # fmt: skip
    """The shard is there still; what was made of it is hashed before it goes."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "free_file", lambda _: None)
        if number < 4:
            with stop_after(number):
                reshard_folder(v2_copy, out, jobs=1, consume=True)
        else:
            patch.setattr(run_module, "end_journal", lambda _: None)
            reshard_folder(v2_copy, out, jobs=1, consume=True)
            (out / "manifest.json").unlink()
    assert shards_of(v2_copy) == SHARDS
    whole = [path for path in out.rglob("*.safetensors") if path.parent.name != "source"]
    flip(whole[0])
    assert tree(reshard_folder(v2_copy, out, jobs=1, consume=True)) == tree(v2_resharded)
    assert shards_of(v2_copy) == []


def test_a_restore_that_was_stopped_between_the_record_and_the_freeing(
    v2_folder: Path, v2_resharded: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, stop_after: Stop
) -> None:
    root, out = shutil.copytree(v2_resharded, tmp_path / "resharded"), tmp_path / "back"
    with monkeypatch.context() as patch:
        patch.setattr(restore_module, "free_file", lambda _: None)
        with stop_after(2):
            rebuild(root, out, consume=True)
    flip(out / SHARDS[0])
    rebuild(root, out, consume=True)
    assert tree(out) == own(tree(v2_folder))
    assert not root.exists()


def test_consuming_may_be_taken_up_later(
    v2_copy: Path, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree,
) -> None:  # fmt: skip
    """When the disk turns out to be too small: shards that were taken before are freed first."""
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_copy, out, jobs=1)
    with stop_after(1):
        reshard_folder(v2_copy, out, jobs=1, consume=True)
    assert shards_of(v2_copy) == SHARDS[3:]
    with stop_after(0):
        reshard_folder(v2_copy, out, jobs=1)
    assert shards_of(v2_copy) == SHARDS[3:]
    reshard_folder(v2_copy, out, jobs=1)
    assert tree(out) == tree(v2_resharded)
    assert shards_of(v2_copy) == SHARDS[3:]
    with stop_after(1):
        rebuild(out, tmp_path / "back")
    with stop_after(1):
        rebuild(out, tmp_path / "back", consume=True)
    rebuild(out, tmp_path / "back", consume=True)
    assert tree(tmp_path / "back") == own(tree(v2_folder))
    assert not out.exists()


def finished_files(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*.safetensors"))


@pytest.mark.parametrize("position", [0, 5, 4095, 4096, -1])
def test_paranoia_finds_a_flipped_bit_in_a_finished_file(
    position: int, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with stop_after(3):
        reshard_folder(v2_folder, out, jobs=1)
    files = finished_files(out)
    assert len(files) >= 4
    for path in files:
        flip(path, position)
    assert tree(reshard_folder(v2_folder, out, paranoid=True)) == tree(v2_resharded)


@pytest.mark.parametrize("position", [0, 4096, 5000])
def test_an_unfinished_file_is_hashed_in_any_case(
    position: int, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with stop_after(3):
        reshard_folder(v2_folder, out, jobs=1)
    (out / CUT).rename(out / f"{CUT}.partial") if (out / CUT).exists() else None
    flip(out / f"{CUT}.partial", position)
    assert tree(reshard_folder(v2_folder, out)) == tree(v2_resharded)


@pytest.mark.parametrize("how", ["cut", "grown", "gone", "empty"])
def test_a_finished_file_of_another_size_is_done_again(
    how: str, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with stop_after(3):
        reshard_folder(v2_folder, out, jobs=1)
    for path in finished_files(out)[:3]:
        size = path.stat().st_size
        if how == "gone":
            path.unlink()
        else:
            os.truncate(path, {"cut": size - 1, "grown": size + 1, "empty": 0}[how])
    assert tree(reshard_folder(v2_folder, out)) == tree(v2_resharded)


@pytest.mark.parametrize("how", ["cut", "gone", "flipped"])
def test_what_cannot_be_done_again_is_left_and_named(
    how: str, v2_copy: Path, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard,
    stop_after: Stop, tree: Tree,
) -> None:  # fmt: skip
    """Its shard is gone. With a copy of the shard put back, the same command ends well."""
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_copy, out, jobs=1, consume=True)
    path = out / "layers/0/dense.safetensors"
    if how == "gone":
        path.rename(tmp_path / "away")
    elif how == "cut":
        os.truncate(path, 5000)
    else:
        flip(path)
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(
            IntegrityError, match=r"layers/0/dense.*is damaged, and model-0000[12].*, which it came from"
        ):
            reshard_folder(v2_copy, out, consume=True, paranoid=True)
        assert tree(tmp_path) == before
    for name in SHARDS[:2]:
        shutil.copy2(v2_folder / name, v2_copy / name)
    assert tree(reshard_folder(v2_copy, out, consume=True, paranoid=True)) == tree(v2_resharded)
    assert shards_of(v2_copy) == []


def test_a_restored_shard_that_cannot_be_made_again(
    v2_folder: Path, v2_resharded: Path, tmp_path: Path, stop_after: Stop, tree: Tree
) -> None:
    root, out = shutil.copytree(v2_resharded, tmp_path / "resharded"), tmp_path / "back"
    with stop_after(3):
        rebuild(root, out, consume=True)
    flip(out / SHARDS[0])
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=f"{SHARDS[0]}: is damaged, and .* was freed; put the shard back"):
            rebuild(root, out, consume=True, paranoid=True)
        assert tree(tmp_path) == before
    shutil.copy(v2_folder / SHARDS[0], out / SHARDS[0])
    rebuild(root, out, consume=True, paranoid=True)
    assert tree(out) == own(tree(v2_folder))


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_restored_shard_is_made_again(
    how: str, v2_folder: Path, v2_resharded: Path, tmp_path: Path, stop_after: Stop, tree: Tree
) -> None:
    out = tmp_path / "back"
    with stop_after(3):
        rebuild(v2_resharded, out)
    if how == "flipped":
        flip(out / SHARDS[1])
    elif how == "cut":
        os.truncate(out / SHARDS[1], 100)
    else:
        (out / SHARDS[1]).unlink()
    rebuild(v2_resharded, out, paranoid=how == "flipped")
    assert tree(out) == own(tree(v2_folder))


def test_a_restore_of_another_checkpoint_is_refused(
    v2_resharded: Path, v3_resharded: Path, v2_folder: Path, tmp_path: Path, stop_after: Stop, tree: Tree,
    reshard_folder: Reshard,
) -> None:  # fmt: skip
    """Nor does a run go on with a restore, nor the other way round."""
    with stop_after(2):
        rebuild(v2_resharded, tmp_path / "back")
    with stop_after(2):
        reshard_folder(v2_folder, tmp_path / "out", jobs=1)
    before = tree(tmp_path)
    for root, out in ((v3_resharded, tmp_path / "back"), (v2_resharded, tmp_path / "out")):
        with pytest.raises(ManifestError, match="another command was interrupted here"):
            rebuild(root, out)
    with pytest.raises(ManifestError, match="`reshard restore` was interrupted here"):
        reshard_folder(v2_folder, tmp_path / "back")
    assert tree(tmp_path) == before


def test_the_leavings_of_one_are_not_those_of_another(
    v2_resharded: Path, v3_resharded: Path, tmp_path: Path, stop_at: StopAt, stop_after: Stop, tree: Tree
) -> None:
    """A restore that only has to clean up is asked for with a folder that another one takes apart."""
    root, other = shutil.copytree(v2_resharded, tmp_path / "one"), shutil.copytree(v3_resharded, tmp_path / "other")
    with stop_at(restore_module, "_remove_rest"):
        rebuild(root, tmp_path / "back", consume=True)
    with stop_after(1):
        rebuild(other, tmp_path / "elsewhere", consume=True)
    before = tree(tmp_path)
    assert not clean_up_restored(other, tmp_path / "back")
    with pytest.raises(ToolkitError):
        rebuild(other, tmp_path / "back", consume=True)
    assert tree(tmp_path) == before
    assert clean_up_restored(root, tmp_path / "back")
    assert not root.exists()
    assert not (tmp_path / "back" / JOURNAL).exists()


def limit(patch: pytest.MonkeyPatch, room: Callable[[], int]) -> None:
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        status = list(real(path))
        status[1], status[4] = 1, room()
        return os.statvfs_result(status)

    patch.setattr(os, "statvfs", statvfs)


@pytest.mark.parametrize("consume", WAYS)
def test_what_was_written_is_not_asked_for_again(
    consume: bool, v3_copy: Path, tmp_path: Path, plan_of: Any, reshard_folder: Reshard, stop_after: Stop
) -> None:
    """A disk that is large enough for an undisturbed run is so for one that goes on."""
    out = tmp_path / "out"
    source, plan = plan_of(v3_copy)
    said = run_module.consume_peak_bytes(source, plan, 1) if consume else run_module.needed_bytes(source, plan)
    before = size_of(tmp_path)
    with stop_after(20):
        reshard_folder(v3_copy, out, jobs=1, consume=consume)
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, lambda: said - (size_of(tmp_path) - before))
        reshard_folder(v3_copy, out, jobs=1, consume=consume)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_too_little_room_to_go_on_is_said(
    v3_folder: Path, v3_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    out = tmp_path / "out"
    with stop_after(20):
        reshard_folder(v3_folder, out, jobs=1)
    files = len(tree(out))
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, lambda: 1000)
        with pytest.raises(ResourceError, match="the disk has 1,000 free"):
            reshard_folder(v3_folder, out)
    assert len(tree(out)) >= files - 4  # files that no record vouched for are gone
    assert tree(reshard_folder(v3_folder, out)) == tree(v3_resharded)


def test_a_disk_that_fails_once_more(
    v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, fail_call: Any,
    tree: Tree, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run that goes on and fails leaves what it found there, also before it records anything itself."""
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_folder, out, jobs=1)
    for name, number in (("pwrite", 1), ("fsync", 2), ("preadv", 3), ("rename", 1), ("pwrite", 8)):
        fail_call(name, number)
        with pytest.raises(ToolkitError):
            reshard_folder(v2_folder, out, jobs=1)
        monkeypatch.undo()
        assert '"shard":"model-00002' in (out / JOURNAL).read_text()
    outcome = go_on(v2_folder, out)
    assert outcome.kept_bytes > 0
    assert tree(out) == tree(v2_resharded)


def test_small_files_that_a_kill_left_unfinished(
    v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    out = tmp_path / "out"
    with stop_after(1):
        reshard_folder(v2_folder, out, jobs=1)
    for name in ("config.json", "source/headers/3.zst", "model.safetensors.index.json", "manifest.json", JOURNAL):
        (out / f"{name}.partial").write_bytes(b"torn")
        if name != JOURNAL:
            (out / name).unlink(missing_ok=True)
    (out / "tokenizer.json").write_bytes(b"torn")
    assert tree(reshard_folder(v2_folder, out)) == tree(v2_resharded)


def test_freeing_that_fails_loses_nothing(
    v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(consume_module, "free_file", refuse)
        patch.setattr(run_module, "free_file", refuse)
        with pytest.raises(ToolkitError, match="Permission denied"):
            reshard_folder(v2_copy, tmp_path / "out", jobs=1, consume=True)
    assert shards_of(v2_copy) == SHARDS
    assert tree(reshard_folder(v2_copy, tmp_path / "out", consume=True)) == tree(v2_resharded)
    assert shards_of(v2_copy) == []


@pytest.mark.parametrize("path", [EMBED, "layers/1/experts/2.safetensors"])
def test_what_was_lost_gets_its_name_only_when_it_is_what_it_was(
    path: str, v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Any, stop_after: Any, tree: Any,
    plan_of: Any,
) -> None:  # fmt: skip
    """Else the next run would believe it by its size."""
    out = tmp_path / "out"
    with stop_after(3):
        reshard_folder(v2_copy, out, jobs=1)
    (out / path).unlink()
    (file,) = (file for file in plan_of(v2_copy)[1].files if file.path == path)
    tensor = next(tensor for tensor in file.tensors if tensor.shard != SHARDS[3])
    shard = v2_copy / tensor.shard
    raw, times = shard.read_bytes(), shard.stat()
    for content in (raw[: tensor.source_offset] + bytes([raw[tensor.source_offset] ^ 1]), raw):
        shard.write_bytes(content + raw[len(content) :])
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        if content == raw:
            reshard_folder(v2_copy, out)
        else:
            for _ in range(3):
                with pytest.raises(ManifestError, match="has other bytes than were taken before"):
                    reshard_folder(v2_copy, out)
                assert not (out / path).exists()
    assert tree(out) == tree(v2_resharded)
