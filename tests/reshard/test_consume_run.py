"""A whole way there and back without room for a second copy: nothing is freed too early, and all of it comes back."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests.errors import IncompleteError, IntegrityError, LockedError, ManifestError, ResourceError, ToolkitError
from manifests.schema import Selection
from reshard import restore as restore_module
from reshard import run as run_module
from reshard.blocks import Reader
from reshard.earlier import find_earlier
from reshard.lock import lock_folder
from reshard.plan import SelectionError, make_plan
from reshard.progress import Progress
from reshard.restore import clean_up_restored, open_restored, restore
from reshard.saved import read_saved_headers
from reshard.source import read_source

Tree = Callable[[Path], dict[str, str]]
Reshard = Callable[..., Path]
FOREIGN = ".cache", "pytorch_model.bin", "consolidated.safetensors", "figures/.git"
"""What a run leaves out: no part of the checkpoint, so neither kept nor freed."""


def rebuild(root: Path, out: Path, *, jobs: int = 2, **options: bool) -> None:
    with Progress(0, label="", quiet=True) as progress:
        restore(open_restored(root, out), out, jobs=jobs, progress=progress, **options)


def shards_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def own(found: dict[str, str]) -> dict[str, str]:
    """A tree without what is foreign."""
    return {path: what for path, what in found.items() if not path.startswith(FOREIGN)}


@pytest.mark.parametrize("jobs", [1, 4])
def test_there_and_back_again(
    jobs: int, v3_copy: Path, v3_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    original = tree(v3_copy)
    out = reshard_folder(v3_copy, tmp_path / "out", jobs=jobs, consume=True)
    assert tree(out) == tree(v3_resharded)
    # The shards are gone, and they alone.
    assert tree(v3_copy) == {path: what for path, what in original.items() if not path.startswith("model-0")}
    rebuild(out, tmp_path / "back", jobs=jobs, consume=True)
    assert tree(tmp_path / "back") == own(original)
    assert not out.exists()


def test_what_somebody_put_there_stays(v2_folder: Path, resharded_copy: Path, tmp_path: Path) -> None:
    (resharded_copy / "layers" / "1" / "experts" / "notes.txt").write_text("mine")
    (resharded_copy / "mine.txt").write_text("mine")
    rebuild(resharded_copy, tmp_path / "back", consume=True)
    left = {path.relative_to(resharded_copy).as_posix() for path in resharded_copy.rglob("*") if path.is_file()}
    assert left == {"layers/1/experts/notes.txt", "mine.txt"}


def test_without_consuming_nothing_is_touched(
    v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, stamps: Callable[[Path], Any]
) -> None:
    before = stamps(v2_copy)
    out = reshard_folder(v2_copy, tmp_path / "out")
    assert stamps(v2_copy) == before
    before = stamps(out)
    rebuild(out, tmp_path / "back")
    assert stamps(out) == before


@contextmanager
def durable_before_freed(patch: pytest.MonkeyPatch, module: Any, check: Callable[[Path], None]) -> Iterator[list[str]]:
    """Look at every file in the moment before it is freed; the names of all of them."""
    freed: list[str] = []
    real = module.free_file

    def free(path: Path) -> None:
        check(path)
        freed.append(path.name)
        real(path)

    patch.setattr(module, "free_file", free)
    yield freed


def test_a_shard_is_freed_when_all_of_it_is_recorded_and_readable(
    v3_copy: Path, tmp_path: Path, reshard_folder: Reshard, plan_of: Any, v3_bytes: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    source, plan = plan_of(v3_copy)
    places = {tensor.name: (file.path, tensor) for file in plan.files for tensor in file.tensors}

    def check(path: Path) -> None:
        assert f'"shard":"{path.name}"' in (out / "reshard-journal.jsonl").read_text()
        for tensor in source.shards[path.name].tensors:
            file, place = places[tensor.name]
            try:
                raw = (out / f"{file}.partial").read_bytes()
            except FileNotFoundError:  # finished, maybe just now, by another worker
                raw = (out / file).read_bytes()
            assert raw[place.output_offset : place.output_offset + place.size] == v3_bytes[tensor.name]
        with pytest.raises(IncompleteError):
            manifests.open(out)

    with durable_before_freed(monkeypatch, run_module, check) as freed:
        reshard_folder(v3_copy, out, jobs=3, consume=True)
    assert sorted(freed) == list(source.shards)


def test_what_is_taken_again_must_be_what_was_taken_before(
    v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Any, tree: Any
) -> None:
    """Else one misread, or a changed source with its old time, would be freed and be in no copy."""
    out = tmp_path / "out"
    with stop_after(3):
        reshard_folder(v2_copy, out, jobs=1)
    path = out / "layers/1/experts/0.safetensors"
    path.unlink()
    source = read_source(v2_copy)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    shard, tensor = next(
        (shard, tensor) for shard, header in source.shards.items() for tensor in header.tensors if tensor.name == name
    )
    raw = bytearray((v2_copy / shard).read_bytes())
    raw[len(source.shards[shard].raw) + tensor.begin] ^= 1
    times = (v2_copy / shard).stat()
    (v2_copy / shard).write_bytes(raw)
    os.utime(v2_copy / shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    before = tree(v2_copy)
    with pytest.raises(ManifestError, match=f"{shard}: tensor '{name}' has other bytes than were taken before"):
        reshard_folder(v2_copy, out, jobs=1, consume=True)
    assert (v2_copy / shard).exists()
    assert tree(v2_copy).items() <= before.items()


@pytest.mark.parametrize(("code", "stays"), [(errno.EIO, False), (errno.EBUSY, True)])
def test_an_empty_folder_that_cannot_be_removed(
    code: int, stays: bool, v2_resharded: Path, v2_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A disk error is told, and the same command ends it; the root of a disk may stay."""
    root, back = shutil.copytree(v2_resharded, tmp_path / "resharded"), tmp_path / "back"
    real = Path.rmdir

    def rmdir(path: Path) -> None:
        if path == root:
            raise OSError(code, os.strerror(code))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", rmdir)
        if stays:
            rebuild(root, back, consume=True)
        else:
            with pytest.raises(ToolkitError, match="resharded: all is restored, but it cannot be removed: "):
                rebuild(root, back, consume=True)
            assert (back / "reshard-journal.jsonl").exists()
    if not stays:
        assert clean_up_restored(root, back)
    assert (root.exists(), shards_of(back)) == (stays, shards_of(v2_folder))


def test_a_file_is_freed_when_all_its_shards_are_back(
    resharded_copy: Path, v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = manifests.open(resharded_copy)
    headers = read_saved_headers(checkpoint)
    back = tmp_path / "back"

    def check(path: Path) -> None:
        names = {entry.name for entry in manifests.open(path).tensors()}
        for shard, header in headers.items():
            if names & {tensor.name for tensor in header.tensors}:
                assert (back / shard).read_bytes() == (v3_folder / shard).read_bytes()
                assert f'"shard":"{shard}"' in (back / "reshard-journal.jsonl").read_text()
        assert not (resharded_copy / "manifest.json").exists()
        assert (resharded_copy / "manifest.json.aside").exists()

    with durable_before_freed(monkeypatch, restore_module, check) as freed:
        rebuild(resharded_copy, back, jobs=3, consume=True)
    assert len(freed) == len(checkpoint.manifest.files)


class Taken:
    """Bytes that are written, less those that are freed: now and at the most."""

    def __init__(self, patch: pytest.MonkeyPatch, module: Any) -> None:
        self.now = self.peak = 0
        self._lock = threading.Lock()
        pwrite, free = os.pwrite, module.free_file

        def write(descriptor: int, data: Any, offset: int) -> int:
            count = pwrite(descriptor, data, offset)
            self._add(count)
            return count

        def freeing(path: Path) -> None:
            size = path.stat().st_size
            free(path)
            self._add(-size)

        patch.setattr(os, "pwrite", write)
        patch.setattr(module, "free_file", freeing)

    def _add(self, count: int) -> None:
        with self._lock:
            self.now += count
            self.peak = max(self.peak, self.now)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("name", ["v3_folder", "kimi_folder"])
def test_no_more_disk_is_taken_than_was_said(
    name: str, jobs: int, tmp_path: Path, request: pytest.FixtureRequest, plan_of: Any, reshard_folder: Reshard
) -> None:
    source_folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "source")
    source, plan = plan_of(source_folder)
    said = run_module.consume_peak_bytes(source, plan, jobs)
    whole = sum(header.file_bytes for header in source.shards.values())
    beside = run_module.needed_bytes(source, plan) - plan.output_bytes
    with pytest.MonkeyPatch.context() as patch:
        taken = Taken(patch, run_module)
        out = reshard_folder(source_folder, tmp_path / "out", jobs=jobs, consume=True)
    assert taken.peak <= said
    # The headers of these tiny files are larger than what is in them; all else is what some shards take.
    headers = plan.output_bytes - plan.payload_bytes
    assert said <= beside + headers + 2 * (jobs + 1) * max(header.file_bytes for header in source.shards.values())
    assert said - beside - headers < 0.6 * whole
    checkpoint = manifests.open(out)
    said = restore_module.consume_peak_bytes(checkpoint, read_saved_headers(checkpoint), jobs)
    with pytest.MonkeyPatch.context() as patch:
        taken = Taken(patch, restore_module)
        rebuild(out, tmp_path / "back", jobs=jobs, consume=True)
    journal = 200 * (len(source.shards) + 2)
    assert taken.peak <= said + journal
    assert said < 0.6 * whole


@pytest.mark.parametrize("first", ["part", "interrupted"])
def test_what_was_taken_without_consuming_is_no_room_for_it(
    first: str, v3_copy: Path, tmp_path: Path, plan_of: Any, reshard_folder: Reshard, stop_after: Any
) -> None:
    """It is there twice until its shards are freed."""
    out = tmp_path / "out"
    if first == "part":
        reshard_folder(v3_copy, out, Selection(layers=(0, 1, 3)))
    else:
        with stop_after(25):
            reshard_folder(v3_copy, out, jobs=1)
    source, plan = plan_of(v3_copy)
    durable = find_earlier(v3_copy, out).durable
    said = run_module.still_needed_bytes(source, plan, out, durable, consume=True, jobs=1)
    with pytest.MonkeyPatch.context() as patch:
        taken = Taken(patch, run_module)
        reshard_folder(v3_copy, out, jobs=1, consume=True)
    assert 0 < taken.peak <= said <= run_module.consume_peak_bytes(source, plan)


def free_space(patch: pytest.MonkeyPatch, room: int) -> None:
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        status = list(real(path))
        status[1], status[4] = 1, room
        return os.statvfs_result(status)

    patch.setattr(os, "statvfs", statvfs)


def test_too_little_room_is_said_before_anything_is_freed(
    v3_copy: Path, tmp_path: Path, plan_of: Any, reshard_folder: Reshard, tree: Tree
) -> None:
    source, plan = plan_of(v3_copy)
    needed = run_module.consume_peak_bytes(source, plan, 1)
    before = tree(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        free_space(patch, needed - 1)
        with pytest.raises(ResourceError, match=f"needs {needed:,} bytes"):
            reshard_folder(v3_copy, tmp_path / "out", jobs=1, consume=True)
        assert tree(tmp_path) == before
        free_space(patch, needed)
        # On another disk nothing that is freed helps.
        patch.setattr(run_module, "same_disk", lambda *_: False)
        whole = run_module.needed_bytes(source, plan)
        with pytest.raises(ResourceError, match=f"needs {whole:,} bytes"):
            reshard_folder(v3_copy, tmp_path / "out", jobs=1, consume=True)
        assert tree(tmp_path) == before
        patch.setattr(run_module, "same_disk", lambda *_: True)
        reshard_folder(v3_copy, tmp_path / "out", jobs=1, consume=True)
    checkpoint = manifests.open(tmp_path / "out")
    needed = restore_module.consume_peak_bytes(checkpoint, read_saved_headers(checkpoint), 1)
    before = tree(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        free_space(patch, needed - 1)
        with pytest.raises(ResourceError, match=f"needs {needed:,} bytes"):
            rebuild(tmp_path / "out", tmp_path / "back", jobs=1, consume=True)
        assert tree(tmp_path) == before
        free_space(patch, needed)
        patch.setattr(restore_module, "same_disk", lambda *_: False)
        with pytest.raises(ResourceError, match="needs"):
            rebuild(tmp_path / "out", tmp_path / "back", jobs=1, consume=True)
        assert tree(tmp_path) == before


def test_a_part_is_not_consumed(v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree) -> None:
    before = tree(tmp_path)
    with pytest.raises(SelectionError, match="--consume frees the whole source"):
        reshard_folder(v2_copy, tmp_path / "out", Selection(layers=(1,)), consume=True)
    assert tree(tmp_path) == before
    # One that leaves nothing out is no part.
    reshard_folder(v2_copy, tmp_path / "out", Selection(layers=(0, 1)), consume=True)
    assert shards_of(v2_copy) == []
    rebuild(tmp_path / "out", tmp_path / "back", consume=True)
    assert tree(tmp_path / "back") == own({path[3:]: what for path, what in before.items() if path.startswith("v2/")})


@pytest.mark.parametrize("how", ["link", "hard link"])
def test_files_of_others_are_not_consumed(
    how: str, v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    root = shutil.copytree(v2_resharded, tmp_path / "resharded")
    for path in (v2_copy / shards_of(v2_copy)[2], root / "layers/1/experts/3.safetensors"):
        if how == "link":
            path.rename(path.with_name("real.partial"))
            path.symlink_to("real.partial")
        else:
            (tmp_path / path.name).hardlink_to(path)
    before = tree(tmp_path)
    with pytest.raises(ToolkitError, match=r"00003.*(is a link|has 2 names)"):
        reshard_folder(v2_copy, tmp_path / "out", consume=True)
    with pytest.raises(ToolkitError, match=r"experts/3.*(is a link|has 2 names)"):
        rebuild(root, tmp_path / "back", consume=True)
    assert tree(tmp_path) == before


def test_one_consumer_at_a_time(
    v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    root = shutil.copytree(v2_resharded, tmp_path / "resharded")
    before = tree(tmp_path)
    with lock_folder(v2_copy), pytest.raises(LockedError, match="v2: another process"):
        reshard_folder(v2_copy, tmp_path / "out", consume=True)
    with lock_folder(root), pytest.raises(LockedError, match="resharded: another process"):
        rebuild(root, tmp_path / "back", consume=True)
    assert tree(tmp_path) == before


def test_a_damaged_checkpoint_is_not_taken_apart_further(
    v2_resharded: Path, v2_folder: Path, tmp_path: Path, tree: Tree
) -> None:
    """What is right is restored, and with the damaged file replaced the rest follows."""
    root, back = shutil.copytree(v2_resharded, tmp_path / "resharded"), tmp_path / "back"
    damaged = root / "layers/1/experts/3.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"rebuilt bytes have sha256 .*experts/3\.safetensors: bytes "):
            rebuild(root, back, jobs=1, consume=True)
        assert shards_of(back) == shards_of(v2_folder)[:3]
        assert damaged.exists()
    with pytest.raises(IncompleteError, match="is being taken apart"):
        manifests.open(root)
    shutil.copy(v2_resharded / "layers/1/experts/3.safetensors", damaged)
    rebuild(root, back, consume=True)
    assert tree(back) == own(tree(v2_folder))
    assert not root.exists()


def test_what_is_consumed_is_not_written_into(
    v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    root = shutil.copytree(v2_resharded, tmp_path / "resharded")
    (tmp_path / "link").symlink_to("resharded")
    before = tree(tmp_path)
    for out in (root, root / "deep", tmp_path, tmp_path / "link" / "deep"):
        with pytest.raises(ToolkitError, match=r"is the source itself|lies inside"):
            rebuild(root, out, consume=True)
    for out in (v2_copy, v2_copy / "deep", tmp_path):
        with pytest.raises(ToolkitError, match=r"is the source itself|lies inside"):
            reshard_folder(v2_copy, out, consume=True)
    assert tree(tmp_path) == before


def test_a_used_up_source_and_its_checkpoint(
    v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, stamps: Callable[[Path], Any], program: Any
) -> None:
    """The same command once more finds that all is there; another one is told what is missing."""
    out = reshard_folder(v2_copy, tmp_path / "out", consume=True)
    before = stamps(out)
    reshard_folder(v2_copy, out, consume=True)
    assert stamps(out) == before
    result = program("reshard", "run", v2_copy, tmp_path / "other")
    assert (result.code, result.err.count("\n")) == (10, 1)
    assert "download them, or use the folder that `reshard run --consume` made of them" in result.err
    assert not (tmp_path / "other").exists()


def test_every_byte_is_read_once(v3_copy: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    """Also when it is freed: what is recorded is not read again."""
    sizes = {path.name: path.stat().st_size for path in v3_copy.glob("model-0*.safetensors")}
    read: dict[str, int] = dict.fromkeys(sizes, 0)
    with pytest.MonkeyPatch.context() as patch:
        real = Reader.read

        def counted(self: Reader, *arguments: Any) -> Any:
            block, is_hole = real(self, *arguments)
            name = self._path.name
            if name in read:
                read[name] += len(block)
            return block, is_hole

        patch.setattr(Reader, "read", counted)
        reshard_folder(v3_copy, tmp_path / "out", jobs=1, consume=True)
    assert read == sizes


@pytest.mark.parametrize("path", ["layers/1/experts/2.safetensors", "model/embed.safetensors"])
def test_nothing_is_freed_on_the_strength_of_a_part_that_nobody_looked_at_since(
    path: str, v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    """A part's shards are not read whole, so none of them is recorded as such; their tensors are."""
    out = reshard_folder(v2_copy, tmp_path / "out", Selection(layers=(1,)))
    raw = bytearray((out / path).read_bytes())
    raw[5000] ^= 1
    (out / path).write_bytes(raw)
    reshard_folder(v2_copy, out, consume=True)
    assert (shards_of(v2_copy), tree(out)) == ([], tree(v2_resharded))


def test_what_consuming_began_and_another_run_ended_is_complete(
    v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Any, stop_at: Any,
    tree: Tree, program: Any,
) -> None:  # fmt: skip
    """Though a part of the source is gone, and a part is there."""
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_copy, out, jobs=1, consume=True)
    source = read_source(v2_copy, find_earlier(v2_copy, out).freed)
    with stop_at(run_module, "end_journal"), Progress(0, label="", quiet=True) as progress:
        run_module.reshard_checkpoint(source, make_plan(source, Selection()), out, jobs=1, progress=progress)
    assert 0 < len(shards_of(v2_copy)) < 4
    for _ in range(2):
        result = program("reshard", "run", v2_copy, out)
        assert (result.code, "all of it was there already" in result.out) == (0, True)
        assert tree(out) == tree(v2_resharded)
    assert program("reshard", "plan", v2_copy, out, "--json").json["state"] == "complete"


def test_a_saved_header_of_a_shard_that_is_there_is_made_again(
    v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Any, tree: Tree
) -> None:
    """Only those of freed shards are needed from where they were saved."""
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_copy, out, jobs=1, consume=True)
    assert len(shards_of(v2_copy)) == 2
    (out / "source/headers/4.zst").write_bytes(b"damaged")
    reshard_folder(v2_copy, out, consume=True)
    assert tree(out) == tree(v2_resharded)


def test_odd_files_beside_the_shards(v2_copy: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    """A file that no shard of the index is, however it is called, is nobody's to free."""
    extra = v2_copy / "model-00005-of-000004.safetensors"
    extra.write_bytes(b"not one of them")
    reshard_folder(v2_copy, tmp_path / "out", consume=True)
    assert extra.read_bytes() == b"not one of them"
    with closing(Reader(extra)) as reader:
        assert b"".join(bytes(block) for block in reader.blocks(0, 3)) == b"not"
