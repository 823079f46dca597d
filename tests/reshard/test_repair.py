"""Every kind of damage goes away, with the source's shards or with another copy; nothing wrong ever takes a place."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests.errors import (
    IncompleteError,
    IntegrityError,
    LockedError,
    ManifestError,
    SourceNotFoundError,
    ToolkitError,
)
from manifests.schema import FileEntry
from manifests.storage import encode
from reshard.progress import Progress
from reshard.rebuild import Repaired
from reshard.repair import UnrepairedError, repair
from reshard.verify import verify

EXPERT = "layers/2/experts/03.safetensors"
DENSE = "layers/1/dense.safetensors"
Tree = Callable[[Path], dict[str, str]]
Change = Callable[[Path], object]


def quiet(total_bytes: int, *, label: str) -> Progress:
    return Progress(total_bytes, label=label, quiet=True)


def mend(folder: Path, source: Path, jobs: int = 2) -> list[Repaired]:
    return repair(folder, source, jobs=jobs, progress=quiet)


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


# What is wrong takes no place.


def test_a_source_that_is_damaged_too(
    resharded_copy: Path, v3_copy: Path, v3_resharded: Path, tree: Tree, stamps: Callable[[Path], Any]
) -> None:
    """The other files are repaired; those keep what they have."""
    tensor = file_of(resharded_copy, EXPERT).tensors[1]
    location = manifests.open(v3_copy).find(tensor.name)
    assert location is not None
    flip(Path(location.place), location.offset + location.size - 1)
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
    assert location.place in first
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
        mend(resharded_copy, Path(shards[0].place))
    assert [done.path for done in caught.value.repaired] == [EXPERT]
    assert len(caught.value.failures) == 1
    assert f"has no tensor {second.name!r}; it came from {shards[1].file}" in caught.value.failures[0]
    assert [done.path for done in mend(resharded_copy, Path(shards[1].place))] == [DENSE]
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
