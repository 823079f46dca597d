"""What may be freed, and how much disk is taken at the worst moment: against every order in which it can happen."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ToolkitError
from reshard import consume as consume_module
from reshard.consume import (
    Step,
    check_consumable,
    free_file,
    last_users,
    peak_bytes,
    reshard_steps,
    restore_steps,
    same_disk,
)

BYTES = st.integers(0, 20)


def moments(count: int, jobs: int) -> Iterator[tuple[int, set[int]]]:
    """Every moment of a run: how many shards were begun, which of them are under way.

    They are begun in order; when the last one was, all others under way were, and it itself.
    """
    for begun in range(count + 1):
        for size in range(min(jobs, begun) + 1):
            for under_way in itertools.combinations(range(begun), size):
                if len({*under_way, begun - 1}) <= jobs:
                    yield begun, set(under_way)


@given(sizes=st.lists(st.tuples(BYTES, BYTES), max_size=6), jobs=st.integers(1, 4))
def test_the_peak_of_a_resharding_is_that_of_its_worst_order(sizes: list[tuple[int, int]], jobs: int) -> None:
    """Each shard writes, and is freed itself when it is done."""
    steps = [Step(written=written, freed=shard, held=shard) for written, shard in sizes]
    worst = max(
        sum(written for written, _ in sizes[:begun])
        - sum(shard for number, (_, shard) in enumerate(sizes[:begun]) if number not in under_way)
        for begun, under_way in moments(len(sizes), jobs)
    )
    assert peak_bytes(steps, jobs) == worst


FILES = st.lists(st.tuples(BYTES, st.sets(st.integers(0, 4), min_size=1)), max_size=8)


@given(shards=st.lists(BYTES, min_size=5, max_size=5), files=FILES, jobs=st.integers(1, 3))
def test_the_peak_of_a_restore_is_never_above_what_is_said(
    shards: list[int], files: list[tuple[int, set[int]]], jobs: int
) -> None:
    """A file is freed when every shard that needs it is done. With one job the peak is exact."""
    file_bytes = {f"f{number}": size for number, (size, _) in enumerate(files)}
    needs = [{f"f{number}" for number, (_, users) in enumerate(files) if shard in users} for shard in range(5)]
    said = peak_bytes(restore_steps(list(zip(shards, needs, strict=True)), file_bytes), jobs)
    worst = max(
        sum(shards[:begun]) - sum(size for size, users in files if users <= set(range(begun)) - under_way)
        for begun, under_way in moments(5, jobs)
    )
    assert said >= worst
    if jobs == 1:
        exact = max(
            sum(shards[: number + 1]) - sum(size for size, users in files if max(users) < number) for number in range(5)
        )
        assert said == exact


@given(st.lists(st.sets(st.integers(0, 6)), max_size=8))
def test_who_needs_a_file_last(needs: Sequence[set[int]]) -> None:
    names = [{str(file) for file in files} for files in needs]
    found = last_users(names)
    assert len(found) == len(needs)
    for number, freed in enumerate(found):
        later: set[str] = set().union(*names[number + 1 :])
        assert set(freed) == names[number] - later
        assert len(freed) == len(set(freed))


def test_nothing_takes_nothing() -> None:
    assert peak_bytes([], 3) == 0
    assert last_users([]) == []
    assert restore_steps([], {}) == []


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_equal_shards_take_as_many_as_are_under_way(jobs: int) -> None:
    steps = [Step(written=10, freed=10, held=10)] * 20
    assert peak_bytes(steps, jobs) == 10 * jobs


def test_the_steps_of_a_plan(v3_folder: Path, plan_of: Callable[..., Any]) -> None:
    """All that is written is somebody's, a header is the first one's, and what is freed are the shards."""
    source, plan = plan_of(v3_folder)
    shard_bytes = {shard: header.file_bytes for shard, header in source.shards.items()}
    steps = dict(zip(shard_bytes, reshard_steps(plan, shard_bytes), strict=True))
    assert sum(step.written for step in steps.values()) == plan.output_bytes
    assert {shard: step.freed for shard, step in steps.items()} == shard_bytes
    for shard, step in steps.items():
        payload = sum(tensor.size for file in plan.files for tensor in file.tensors if tensor.shard == shard)
        opened = [file for file in plan.files if min(tensor.shard for tensor in file.tensors) == shard]
        assert step.written == payload + sum(len(file.header) for file in opened)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "sub/c"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(b"x")
    return tmp_path / "folder"


def test_files_of_their_own_may_be_freed(folder: Path, tmp_path: Path) -> None:
    check_consumable(folder, ["a", "b", "sub/c"])
    (tmp_path / "link").symlink_to("folder")  # the folder itself may have another name
    check_consumable(tmp_path / "link", ["a", "b", "sub/c"])
    check_consumable(tmp_path / "folder" / ".." / "folder", ["a"])


def link_away(path: Path) -> None:
    shutil.move(path, path.parent.parent / "blob")
    path.symlink_to("../blob")


def link_folder(path: Path) -> None:
    (path.parent / "sub").rename(path.parent.parent / "real")
    (path.parent / "sub").symlink_to("../real")


LINKS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a link within": ("b", lambda path: (path.unlink(), path.symlink_to("a")), "b: is a link"),
    "a link that leads away": ("b", link_away, "b: is a link, as in a hub's cache"),
    "a link that leads nowhere": ("b", lambda path: (path.unlink(), path.symlink_to("nowhere")), "b: is a link"),
    "behind a link": ("sub/c", lambda path: link_folder(path.parent), "c: is a link"),
    "a second name": ("b", lambda path: path.with_name("d").hardlink_to(path), "b: has 2 names"),
    "a third name elsewhere": (
        "b",
        lambda path: [(path.parent.parent / name).hardlink_to(path) for name in "de"],
        "b: has 3 names .hard links., so freeing it would free no space",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "make", "says"), LINKS.values(), ids=LINKS.keys())
def test_links_are_refused(folder: Path, name: str, make: Callable[[Path], Any], says: str, tree: Any) -> None:
    make(folder / name)
    before = tree(folder.parent)
    with pytest.raises(ToolkitError, match=f"{folder}/.*{says}"):
        check_consumable(folder, ["a", name])
    check_consumable(folder, ["a"])
    assert tree(folder.parent) == before


def test_a_folder_that_keeps_its_files_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written, and not at the end of the first shard."""
    asked = []

    def access(path: Path, mode: int) -> bool:
        asked.append((Path(path), mode))
        return Path(path).name != "sub"

    monkeypatch.setattr(os, "access", access)  # root may do everything everywhere
    check_consumable(folder, ["a", "b"])
    assert asked == [(folder, os.W_OK | os.X_OK)]
    with pytest.raises(ToolkitError, match=f"{folder}/sub: no file can be removed from it, which --consume would do"):
        check_consumable(folder, ["a", "sub/c"])


def test_the_hubs_cache_is_refused(tmp_path: Path) -> None:
    """As downloads look there."""
    (tmp_path / "models--x" / "blobs").mkdir(parents=True)
    (tmp_path / "models--x" / "blobs" / "hash").write_bytes(b"x")
    snapshot = tmp_path / "models--x" / "snapshots" / "revision"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    with pytest.raises(ToolkitError, match="a hub's cache, whose files other folders share"):
        check_consumable(snapshot, ["model.safetensors"])


def test_one_disk_or_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    assert same_disk(tmp_path / "source", tmp_path / "new" / "deep")
    stat = os.stat
    other = stat(tmp_path).st_dev + 1

    def elsewhere(path: Any, **options: Any) -> os.stat_result:
        found = stat(path, **options)
        values = list(found)
        values[2] = other if Path(path) == tmp_path / "source" else found.st_dev
        return os.stat_result(values)

    monkeypatch.setattr(consume_module.os, "stat", elsewhere)
    assert not same_disk(tmp_path / "source", tmp_path / "new" / "deep")


def test_freeing_is_durable_and_may_be_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    free_file(folder / "a")
    assert not (folder / "a").exists()
    assert synced == [str(folder)]
    free_file(folder / "a")
    assert (folder / "b").exists()
