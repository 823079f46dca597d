"""What is believed of an earlier run: what is there and right; nothing is thrown away that cannot be made again."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import IntegrityError
from reshard.earlier import find_earlier
from reshard.plan import Plan, PlannedFile
from reshard.progress import Progress
from reshard.resume import check_claims
from reshard.transfer import Durable

Tree = Callable[[Path], dict[str, str]]
EXPERT = "layers/1/experts/2.safetensors"
"""Two of its tensors lie in the third shard, the last one in the fourth."""
SINGLE = "model/embed.safetensors"
"""It holds one tensor."""
SHARDS = [f"model-0000{number}-of-000004.safetensors" for number in (1, 2, 3, 4)]


@dataclass
class Case:
    plan: Plan
    out: Path
    durable: Durable
    hashed: int = 0

    def file(self, path: str) -> PlannedFile:
        return next(file for file in self.plan.files if file.path == path)

    def names(self, path: str) -> set[str]:
        return {tensor.name for tensor in self.file(path).tensors}

    def forget(self, *names: str) -> None:
        for name in names:
            del self.durable.tensors[name]

    def check(self, doubted: Collection[str] = (), gone: Collection[str] = (), *, paranoid: bool = False) -> set[str]:
        """The names that were struck."""
        before = set(self.durable.tensors)
        with Progress(self.plan.payload_bytes, label="", quiet=True) as progress:
            check_claims(
                self.plan, self.out, self.durable, doubted_shards=doubted, gone_shards=gone, paranoid=paranoid,
                progress=progress,
            )  # fmt: skip
            self.hashed = progress.bytes
        return before - set(self.durable.tensors)


@pytest.fixture
def case(v2_folder: Path, v2_resharded: Path, tmp_path: Path, plan_of: Callable[..., Any]) -> Case:
    """A whole checkpoint, every tensor of which is claimed."""
    out = shutil.copytree(v2_resharded, tmp_path / "out")
    return Case(plan=plan_of(v2_folder)[1], out=out, durable=find_earlier(v2_folder, out).durable)


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_what_is_right_is_left_alone(case: Case, stamps: Callable[[Path], Any]) -> None:
    before = stamps(case.out)
    assert (case.check(), case.hashed) == (set(), 0)
    assert (case.check(SHARDS), case.hashed) == (set(), case.plan.payload_bytes)
    assert (case.check(gone=SHARDS, paranoid=True), case.hashed) == (set(), case.plan.payload_bytes)
    assert stamps(case.out) == before


@pytest.mark.parametrize("how", ["gone", "cut", "grown", "empty"])
def test_files_of_another_size_are_done_again(case: Case, how: str) -> None:
    path = case.out / EXPERT
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, {"cut": path.stat().st_size - 1, "grown": path.stat().st_size + 1, "empty": 0}[how])
    assert case.check() == case.names(EXPERT)
    assert not path.exists()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_wrong_tensor_is_struck_alone(case: Case, number: int, v2_resharded: Path) -> None:
    path = case.out / EXPERT
    tensor = case.file(EXPERT).tensors[number]
    flip(path, tensor.output_offset + tensor.size // 2)
    assert case.check() == set()  # a size is all that is asked of what was finished
    others = [shard for shard in SHARDS if shard != tensor.shard]
    assert case.check(others) == set()
    assert case.check([tensor.shard]) == {tensor.name}
    # What is right of it is gone on with.
    assert not path.exists()
    damaged = (case.out / f"{EXPERT}.partial").read_bytes()
    right = (v2_resharded / EXPERT).read_bytes()
    assert len(damaged) == len(right)
    assert damaged[: tensor.output_offset] == right[: tensor.output_offset]


def test_paranoia_finds_everything(case: Case) -> None:
    done = set()
    for file in case.plan.files:
        tensor = file.tensors[len(file.tensors) // 2]
        flip(case.out / file.path, tensor.output_offset)
        done.add(tensor.name)
    assert case.check(paranoid=True) == done
    assert not (case.out / SINGLE).exists()
    assert not (case.out / f"{SINGLE}.partial").exists()  # nothing of it was right


@pytest.mark.parametrize("position", [0, 8, 100, 4095])
def test_a_header_is_made_again_from_the_plan(case: Case, position: int, tree: Tree) -> None:
    """The source may be gone, and the tensors are right."""
    before = tree(case.out)
    for path in (EXPERT, SINGLE):
        flip(case.out / path, position)
    assert case.check(gone=SHARDS, paranoid=True) == set()
    assert tree(case.out) == before


def test_what_nobody_vouches_for_is_removed(case: Case) -> None:
    case.forget(*case.names(EXPERT), *case.names(SINGLE))
    os.rename(case.out / SINGLE, case.out / f"{SINGLE}.partial")
    (case.out / "layers/0/dense.safetensors.partial").write_bytes(b"left by somebody before that")
    assert case.check() == set()
    assert not (case.out / EXPERT).exists()
    assert not (case.out / f"{SINGLE}.partial").exists()
    assert not (case.out / "layers/0/dense.safetensors.partial").exists()
    assert (case.out / "layers/0/dense.safetensors").exists()


def test_a_file_that_has_its_name_too_early(case: Case) -> None:
    """Its last tensor came in, and the record that says so did not."""
    last = case.file(EXPERT).tensors[2].name
    case.forget(last)
    assert case.check() == set()
    assert not (case.out / EXPERT).exists()
    assert (case.out / f"{EXPERT}.partial").exists()


@pytest.mark.parametrize("position", [4096, -1, 0])
def test_unfinished_files_are_always_hashed(case: Case, position: int) -> None:
    first, second, last = case.file(EXPERT).tensors
    case.forget(last.name)
    os.rename(case.out / EXPERT, case.out / f"{EXPERT}.partial")
    flip(case.out / f"{EXPERT}.partial", position)
    # The header is written again anyhow, and the last tensor as well.
    assert case.check() == ({first.name} if position == 4096 else set())
    assert second.name in case.durable.tensors
    assert (case.out / f"{EXPERT}.partial").exists()


def test_an_unfinished_file_of_another_size(case: Case) -> None:
    case.forget(case.file(EXPERT).tensors[2].name)
    os.rename(case.out / EXPERT, case.out / f"{EXPERT}.partial")
    os.truncate(case.out / f"{EXPERT}.partial", 5000)
    assert len(case.check()) == 2
    assert not (case.out / f"{EXPERT}.partial").exists()


def test_a_whole_file_that_lost_its_name_gets_it_again(case: Case, tree: Tree) -> None:
    """Left by one who was killed while he looked at it."""
    before = tree(case.out)
    for path in (EXPERT, SINGLE):
        os.rename(case.out / path, case.out / f"{path}.partial")
    flip(case.out / f"{EXPERT}.partial", 3)
    assert case.check(gone=SHARDS) == set()
    assert tree(case.out) == before
    os.rename(case.out / EXPERT, case.out / f"{EXPERT}.partial")
    flip(case.out / f"{EXPERT}.partial", 4096)
    assert case.check() == {case.file(EXPERT).tensors[0].name}


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": lambda path: flip(path, -1), "cut": lambda path: os.truncate(path, 6000),
    "gone": lambda path: path.unlink(), "unfinished and damaged": lambda path: (flip(path, -1), lose_name(path)),
}  # fmt: skip


def lose_name(path: Path) -> None:
    os.rename(path, f"{path}.partial")


@pytest.mark.parametrize("path", [EXPERT, SINGLE])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_nothing_is_removed_whose_source_is_gone(
    case: Case, path: str, damage: Callable[[Path], Any], v2_resharded: Path, tree: Tree
) -> None:
    """One wrong bit is better than none of the others."""
    damage(case.out / path)
    before = tree(case.out)
    tensor = case.file(path).tensors[-1]
    for gone in (SHARDS, [tensor.shard]):
        again = dataclasses.replace(case, durable=Durable(tensors=dict(case.durable.tensors)))
        with pytest.raises(
            IntegrityError, match=f"{case.out / path}.*and model-0000.* was freed; put a good copy of {path} there"
        ):
            again.check(gone=gone, paranoid=True)
        assert tree(case.out) == before
    # What the message says to do helps.
    put_back = dataclasses.replace(case, durable=Durable(tensors=dict(case.durable.tensors)))
    damaged = {name: (case.out / name).read_bytes() for name in (path, f"{path}.partial") if (case.out / name).exists()}
    shutil.copy(v2_resharded / path, case.out / path)
    assert put_back.check(gone=SHARDS, paranoid=True) == set()
    (case.out / path).unlink()
    for name, raw in damaged.items():
        (case.out / name).write_bytes(raw)
    if path == EXPERT:
        assert case.check(gone=[SHARDS[0]], paranoid=True)  # it is not the one that is needed


def test_what_cannot_be_read_is_done_again(case: Case, fail_call: Callable[..., Any]) -> None:
    fail_call("preadv", 1)
    assert case.check([SHARDS[0]]) == {
        tensor.name for file in case.plan.files for tensor in file.tensors if tensor.shard == SHARDS[0]
    }
