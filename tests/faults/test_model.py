"""The model of the disk itself: what it says that a power cut leaves."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from harness.model import SECTOR, VARIANTS, Model, Node
from harness.tree import after_crash, read_tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/old").mkdir(parents=True)
    (tmp_path / "root/old/file").write_bytes(b"from before")
    (tmp_path / "graveyard").mkdir()
    return tmp_path / "root"


@pytest.fixture
def model(root: Path) -> Model:
    return Model(str(root))


def crashes(model: Model, path: str) -> dict[str, object]:
    return {variant: model.crash(variant).get(path, "absent") for variant in VARIANTS}


def test_what_was_there_before_is_durable(model: Model) -> None:
    for variant in (*VARIANTS, "mix:1"):
        assert set(model.crash(variant)) == {"old", "old/file"}
        assert isinstance(model.crash(variant)["old/file"], Node)


def test_a_new_file_needs_its_own_fsync_and_that_of_its_folder(model: Model) -> None:
    node = model.create("old/new")
    model.write(node, 0, b"abc")
    gone = {"lost": "absent", "names": b"", "zeros": bytes(3), "removals": "absent", "data": "absent"}
    assert crashes(model, "old/new") == gone
    model.sync(node)
    gone = {"lost": "absent", "names": b"abc", "zeros": b"abc", "removals": "absent", "data": "absent"}
    assert crashes(model, "old/new") == gone
    folder = model.find("old")
    assert folder is not None
    model.sync(folder)
    assert set(crashes(model, "old/new").values()) == {b"abc"}


def test_a_folder_without_its_own_name_is_lost_with_all_that_is_in_it(model: Model) -> None:
    folder = model.create("new", folder=True)
    node = model.create("new/file")
    model.sync(node)
    model.sync(folder)
    assert "new/file" not in model.crash("lost")
    model.sync(model.root)
    assert model.crash("lost")["new/file"] == b""


def test_a_rename_is_atomic_and_waits_for_the_folder(model: Model) -> None:
    node = model.create("old/a")
    model.write(node, 0, b"1")
    folder = model.find("old")
    assert folder is not None
    model.sync(node)
    model.sync(folder)
    model.rename("old/a", "old/b")
    assert [set(model.crash(variant)) - {"old", "old/file"} for variant in VARIANTS] == [
        {"old/a"},
        {"old/b"},
        {"old/b"},
        {"old/a"},
        {"old/a"},
    ]
    seen = {frozenset(model.crash(f"mix:{seed}")) - {"old", "old/file"} for seed in range(20)}
    assert seen == {frozenset({"old/a"}), frozenset({"old/b"})}
    model.sync(folder)
    assert set(model.crash("lost")) == {"old", "old/file", "old/b"}


def test_a_removed_file_may_come_back_or_not(model: Model) -> None:
    model.remove("old/file")
    found = crashes(model, "old/file")
    assert {variant for variant, what in found.items() if what == "absent"} == {"names", "zeros", "removals"}
    folder = model.find("old")
    assert folder is not None
    model.sync(folder)
    assert set(crashes(model, "old/file").values()) == {"absent"}


def test_after_a_failed_fsync_the_bytes_are_never_durable_until_written_again(model: Model) -> None:
    node = model.create("file")
    model.sync(model.root)
    model.write(node, 0, b"abc")
    model.sync_failed(node)
    model.write(node, 3, b"def")
    model.sync(node)
    assert model.state()["file"] == b"abcdef"
    assert model.crash("lost")["file"] == b"\0\0\0def"
    model.write(node, 0, b"abc")
    model.sync(node)
    assert model.crash("lost")["file"] == b"abcdef"


def test_a_mix_keeps_whole_sectors(model: Model) -> None:
    node = model.create("file")
    model.sync(model.root)
    model.write(node, 100, b"x" * (3 * SECTOR))
    seen = set()
    for seed in range(400):
        content = model.crash(f"mix:{seed}")["file"]
        assert isinstance(content, bytes)
        borders = [100, 512, 1024, 1536, 1636]
        parts = [content[a:b] for a, b in pairwise(borders)]
        assert all(not any(part) or part == b"x" * len(part) for part in parts)
        seen.add(tuple(any(part) for part in parts))
    assert len(seen) == 16


def test_cutting_and_growing_wait_for_an_fsync_too(model: Model) -> None:
    node = model.find("old/file")
    assert node is not None
    model.load(node, b"from before")
    model.resize(node, 4)
    assert model.crash("lost")["old/file"] == b"from before"
    assert model.crash("zeros")["old/file"] == b"from"
    model.sync(node)
    assert model.crash("lost")["old/file"] == b"from"
    model.resize(node, 6)
    assert model.state()["old/file"] == b"from\0\0"
    assert model.crash("lost")["old/file"] == b"from"


def test_the_tree_after_a_crash_is_put_on_the_disk(root: Path, model: Model) -> None:
    """Removed, renamed and written files, and one that must come back with its inode and its times."""
    (root / "old/other").write_bytes(b"other")
    model = Model(str(root))
    graveyard = root.parent / "graveyard"
    before = (root / "old/file").stat()
    file = model.find("old/file")
    assert file is not None
    model.remove("old/file")
    model.removed[0] = file
    (root / "old/file").rename(graveyard / "0")
    model.rename("old/other", "old/renamed")
    (root / "old/other").rename(root / "old/renamed")
    node = model.create("new")
    model.write(node, 0, b"new")
    (root / "new").write_bytes(b"new")
    assert read_tree(root) == {"old": None, "old/renamed": b"other", "new": b"new"}
    after_crash(root, graveyard, model, model.crash("lost"))
    assert read_tree(root) == {"old": None, "old/file": b"from before", "old/other": b"other"}
    after = (root / "old/file").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_variants_differ_on_the_disk_too(root: Path, model: Model) -> None:
    node = model.create("new")
    model.write(node, 0, b"new")
    (root / "new").write_bytes(b"new")
    after_crash(root, root.parent / "graveyard", model, model.crash("zeros"))
    assert read_tree(root) == {"old": None, "old/file": b"from before", "new": bytes(3)}
