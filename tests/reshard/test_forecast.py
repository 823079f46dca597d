"""What a run will take: exact where it can be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.schema import Selection
from reshard.forecast import (
    estimate_reshard,
    hashing_cores,
    hole_bytes,
    largest_shard,
    needed_inodes,
    open_files,
    share_of_disk,
)
from reshard.transfer import OTHER_OPEN_FILES

PlanOf = Callable[..., Any]
GB = 10**9


@pytest.mark.parametrize(
    ("folder", "selection"),
    [("v3_folder", None), ("v3_folder", Selection(layers=(1,))), ("v2_folder", None), ("single_folder", None)],
)
def test_inodes_are_those_that_a_run_makes(
    folder: str, selection: Selection | None, plan_of: PlanOf, reshard_folder: Callable[..., Path], tmp_path: Path,
    request: pytest.FixtureRequest, tree: Callable[[Path], dict[str, str]],
) -> None:  # fmt: skip
    source = request.getfixturevalue(folder)
    made = tree(reshard_folder(source, tmp_path / "out", selection))
    # And the folder itself, and the journal, which is there until the manifest is.
    assert needed_inodes(*plan_of(source, selection)) == len(made) + 2


def test_open_files_are_two_for_each_file_of_a_shard(plan_of: PlanOf, v2_folder: Path) -> None:
    source, plan = plan_of(v2_folder)
    most = max(
        len({file.path for file in plan.files for tensor in file.tensors if tensor.shard == shard})
        for shard in source.shards
    )
    assert most > 1
    assert open_files(plan, 1) == 2 * most + OTHER_OPEN_FILES
    assert open_files(plan, 3) == 6 * most + OTHER_OPEN_FILES


def test_holes_and_the_largest_shard(plan_of: PlanOf, v3_copy: Path) -> None:
    source, _ = plan_of(v3_copy)
    assert hole_bytes(source) == 0
    largest = largest_shard(source)
    assert largest is not None
    assert largest.stat().st_size == max(header.file_bytes for header in source.shards.values())
    size = largest.stat().st_size
    largest.write_bytes(b"")
    os.truncate(largest, size)
    assert hole_bytes(source) == size
    others = [shard for shard in source.shards if shard != largest.name]
    assert (hole_bytes(source, [largest.name]), hole_bytes(source, others)) == (size, 0)
    for shard in source.shards:
        (v3_copy / shard).unlink()
    assert largest_shard(source) is None
    assert hole_bytes(source) == 0


def estimate(**changed: Any) -> tuple[float, str]:
    given: dict[str, Any] = {
        "holes": 0, "read_rate": 2 * GB, "write_rate": 1 * GB, "shares_disk": True, "hash_rate": GB, "cores": 2,
    }  # fmt: skip
    found = estimate_reshard(600 * GB, 600 * GB, **given | changed)
    return found.seconds, found.limit


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, (900, "the disk")),
        ({"write_rate": None, "read_rate": 1 * GB}, (1200, "the disk")),
        ({"write_rate": None}, (600, "the disk")),  # as long as hashing
        ({"shares_disk": False}, (600, "writing")),
        ({"shares_disk": False, "read_rate": GB / 2}, (1200, "reading")),
        ({"cores": 1}, (1200, "hashing")),
        ({"hash_rate": GB / 2, "shares_disk": False}, (1200, "hashing")),
        ({"holes": 300 * GB}, (600, "hashing")),  # holes are hashed like any zeros
        ({"holes": 300 * GB, "cores": 64}, (450, "the disk")),
    ],
)
def test_the_slowest_stage_is_the_time(changed: dict[str, Any], expected: tuple[float, str]) -> None:
    assert estimate(**changed) == expected


def test_more_may_be_read_than_is_written() -> None:
    found = [
        estimate_reshard(
            3 * GB, GB, holes=holes, read_rate=GB, write_rate=GB / 2, shares_disk=True, hash_rate=GB, cores=64
        ).seconds
        for holes in (0, GB, 2 * GB, 4 * GB)
    ]
    # Holes of what is read may be more than what is written; and they are hashed.
    assert found == [5, 2, 1, 6 / 64]


def test_the_share_counts_both_directions_of_one_disk() -> None:
    assert share_of_disk(8 * GB, 10, read_rate=2 * GB, shares_disk=True) == pytest.approx(0.8)
    assert share_of_disk(8 * GB, 10, read_rate=2 * GB, shares_disk=False) == pytest.approx(0.4)


def test_as_many_cores_hash_as_there_are_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert [hashing_cores(jobs) for jobs in (1, 4, 20)] == [2, 8, 16]
