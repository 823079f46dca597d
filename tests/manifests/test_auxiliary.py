"""Small files of a checkpoint: those of its folder, and those that something else stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests.auxiliary import Auxiliary
from manifests.errors import ManifestError, SourceNotFoundError
from manifests.folder import LocalFolder


def test_a_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"12345")
    auxiliary = Auxiliary(LocalFolder(tmp_path))
    assert auxiliary.read("a.json", max_bytes=5) == b"12345"
    assert auxiliary.size("a.json") == 5
    assert auxiliary.where("a.json") == str(tmp_path / "a.json")


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    auxiliary = Auxiliary(LocalFolder(tmp_path))
    with pytest.raises(SourceNotFoundError, match=r"a\.json: not a regular file$"):
        auxiliary.read("a.json", max_bytes=5)
    assert auxiliary.read("b.json", max_bytes=5) is None
    for name in ("a.json", "b.json"):
        assert auxiliary.size(name) is None
        assert auxiliary.where(name) == str(tmp_path / name)
    assert auxiliary.derived_from == 0


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"12345")
    with pytest.raises(ManifestError, match=r"a\.json: larger than 4 bytes"):
        Auxiliary(LocalFolder(tmp_path)).read("a.json", max_bytes=4)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match="leaves the folder"):
        Auxiliary(LocalFolder(tmp_path / "folder")).read("a.json", max_bytes=4)


def test_the_folders_own_file_wins(tmp_path: Path) -> None:
    auxiliary = Auxiliary(LocalFolder(tmp_path), {"a.json": lambda: b"made", "b.json": lambda: None}, derived_from=7)
    assert auxiliary.read("a.json", max_bytes=9) == b"made"
    assert auxiliary.where("a.json") == f"a.json of the GGUF file in {tmp_path}"
    assert auxiliary.size("a.json") is None
    assert auxiliary.read("b.json", max_bytes=9) is None
    (tmp_path / "a.json").write_bytes(b"own")
    assert auxiliary.read("a.json", max_bytes=9) == b"own"
    assert auxiliary.where("a.json") == str(tmp_path / "a.json")
    assert auxiliary.size("a.json") == 3
