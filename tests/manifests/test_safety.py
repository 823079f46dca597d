"""Paths in files are hostile until proven plain, and links may not lead out of the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ManifestError, SourceNotFoundError
from manifests.safety import check_relative, relative_fault, resolve_inside

REFUSED = [
    "", ".", "..", "/", "//", "/etc/passwd", "//server/share/x", "a//b", "a/", "./a", "a/.", "a/./b", "../a", "a/../b",
    "a/..", "a/b/../../../c", "..\\a", "a\\b", "\\a", "\\\\server\\share\\x", "C:", "C:a", "C:\\a", "C:/a", "c:/a",
    "a:b", "file:///a", "a\0b", "a\nb", "a\tb", "\x7f", "a\u202eb", "a\u2028b", "a\udcffb", "x" * 1025,
]  # fmt: skip

ALLOWED = [
    "a",
    "a.b",
    "..a",
    "a..",
    "...",
    ".hidden",
    "a/b/c.safetensors",
    "a b",
    "~",
    "~root/x",
    "-rf",
    "\u00fcber/\u6a21",
]


@pytest.mark.parametrize("path", REFUSED)
def test_refused(path: str, tmp_path: Path) -> None:
    assert relative_fault(path)
    with pytest.raises(ManifestError, match=r"^the index: path .* refused$"):
        check_relative(path, what="the index")
    with pytest.raises(ManifestError):
        resolve_inside(tmp_path, path)


@pytest.mark.parametrize("path", ALLOWED)
def test_allowed(path: str) -> None:
    assert relative_fault(path) is None
    assert check_relative(path, what="") == path


@given(st.text(st.sampled_from("./\\:aZ\0 ~"), max_size=12) | st.text(max_size=20))
def test_what_is_allowed_stays_below_its_folder(path: str) -> None:
    if relative_fault(path) is not None:
        return
    joined = os.path.normpath(os.path.join("/base/folder", path))
    assert joined.startswith("/base/folder/")
    assert joined == f"/base/folder/{path}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "file").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "root-not").mkdir()
    (tmp_path / "root-not" / "file").write_text("outside, with the root's name as a prefix")
    return root


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "direct").symlink_to("file")
    (root / "sub" / "up").symlink_to("../file")
    (root / "chain").symlink_to("sub/up")
    (root / "absolute").symlink_to(root / "file")
    (root / "folder").symlink_to("sub")
    for name in ("file", "direct", "sub/up", "chain", "absolute", "folder/up"):
        assert resolve_inside(root, name).read_text() == "inside"


def test_a_root_that_is_itself_a_link_is_as_good(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    (root / "direct").symlink_to(root / "file")
    assert resolve_inside(root.parent / "alias", "direct").read_text() == "inside"


@pytest.mark.parametrize(
    "target", ["../secret", "../root-not/file", "/etc/passwd", "/proc/self/mem", "/dev/zero", "sub/../../secret"]
)
def test_links_that_leave_are_refused(root: Path, target: str) -> None:
    (root / "link").symlink_to(target)
    with pytest.raises(ManifestError, match="leaves the folder"):
        resolve_inside(root, "link")


def test_a_chain_that_leaves_and_a_folder_that_leaves_are_refused(root: Path) -> None:
    (root / "sub" / "out").symlink_to("../../secret")
    (root / "chain").symlink_to("sub/out")
    (root / "folder").symlink_to("..")
    for name in ("chain", "folder/secret", "folder/root-not/file"):
        with pytest.raises(ManifestError, match="leaves the folder"):
            resolve_inside(root, name)


def test_what_leads_nowhere_is_not_found(root: Path) -> None:
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    for name in ("dangling", "loop", "absent", "file/below", "x" * 300):
        with pytest.raises(SourceNotFoundError):
            resolve_inside(root, name)


def test_only_regular_files_are_handed_out(root: Path) -> None:
    """Whoever opens a FIFO waits for ever, also behind a link."""
    os.mkfifo(root / "fifo")
    (root / "link").symlink_to("fifo")
    for name in ("fifo", "link", "sub"):
        with pytest.raises(SourceNotFoundError, match="not a regular file"):
            resolve_inside(root, name)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The hub cache's layout of a downloaded checkpoint."""
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0a1b").write_text("blob")
    (repository / "blobs" / "deeper").mkdir()
    (repository / "blobs" / "deeper" / "x").write_text("deeper")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("rev")
    snapshot = repository / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    return snapshot


def test_the_hub_caches_blobs_may_be_linked(snapshot: Path, tmp_path: Path) -> None:
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "file").symlink_to("../../../blobs/0a1b")
    assert resolve_inside(snapshot, "config.json").read_text() == "blob"
    assert resolve_inside(snapshot, "sub/file").read_text() == "blob"
    (tmp_path / "here").symlink_to(snapshot)
    assert resolve_inside(tmp_path / "here", "config.json").read_text() == "blob"


def test_they_may_be_from_a_folder_within_the_snapshot(snapshot: Path) -> None:
    """As split GGUF files are downloaded: each set in a folder of its own."""
    folder = snapshot / "V3-Q4_K_M" / "deeper"
    folder.mkdir(parents=True)
    (folder / "file").symlink_to("../../../../blobs/0a1b")
    (folder / "out").symlink_to("../../../../refs/main")
    assert resolve_inside(folder, "file").read_text() == "blob"
    with pytest.raises(ManifestError, match="leaves the folder"):
        resolve_inside(folder, "out")


def test_nothing_else_of_the_hub_cache_may_be(snapshot: Path, tmp_path: Path) -> None:
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "0a1b").write_text("another model's")
    for number, target in enumerate(
        ["../../refs/main", "../../blobs/deeper/x", "../../../models--org--other/blobs/0a1b"]
    ):
        (snapshot / f"link{number}").symlink_to(target)
        with pytest.raises(ManifestError, match="leaves the folder"):
            resolve_inside(snapshot, f"link{number}")


def test_a_folder_called_blobs_elsewhere_is_no_hub_cache(tmp_path: Path) -> None:
    root = tmp_path / "a" / "other" / "rev"
    root.mkdir(parents=True)
    (tmp_path / "a" / "blobs").mkdir()
    (tmp_path / "a" / "blobs" / "x").write_text("x")
    (root / "link").symlink_to("../../blobs/x")
    with pytest.raises(ManifestError, match="leaves the folder"):
        resolve_inside(root, "link")
