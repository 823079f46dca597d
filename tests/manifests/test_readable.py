"""Whoever reads is told which it was: nothing there, something else, or bytes that cannot be had."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import ManifestError, SourceNotFoundError, ToolkitError
from manifests.folder import LocalFolder
from manifests.gguf import gguf_of, read_gguf
from manifests.header import header_of, read_header
from manifests.jsontext import read_json
from manifests.readable import Readable, in_memory, open_regular
from manifests.safety import resolve_inside
from tests.gguf_files import write_gguf

READERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": read_header,
    "gguf": read_gguf,
    "json": lambda path: read_json(path, max_bytes=100),
    "bytes": lambda path: open_regular(path).__enter__(),
}


@pytest.mark.parametrize("kind", READERS)
def test_each_fault_has_its_own_sentence(kind: str, tmp_path: Path, deadline: None) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name, says in (
        ("folder", "not a regular file"),
        ("fifo", "not a regular file"),
        ("absent", "no such file"),
        ("loop", "no such file"),
        ("file/below", "no such file"),
    ):
        with pytest.raises(SourceNotFoundError) as caught:
            READERS[kind](tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {says}"


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


class Broken(io.FileIO):
    """A file whose disk fails."""

    def read(self, *_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("call", ["stat", "open"])
def test_what_cannot_be_opened_is_not_said_to_be_absent(
    kind: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    monkeypatch.setattr(*((os, "stat") if call == "stat" else (Path, "open")), failing(errno.EACCES))
    with pytest.raises(ToolkitError) as caught:
        READERS[kind](path)
    monkeypatch.undo()
    assert not isinstance(caught.value, SourceNotFoundError)
    assert str(caught.value) == f"{path}: cannot be read: Permission denied"


def test_a_disk_that_fails_later_is_told_of_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    monkeypatch.setattr(Path, "open", lambda path, _: Broken(path))
    for read in (*list(READERS.values())[:3], lambda path: LocalFolder(path.parent).read("file", max_bytes=9)):
        with pytest.raises(ToolkitError, match=r"file: cannot be read: Input/output error"):
            read(path)


def test_a_file_that_goes_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr(Path, "open", failing(errno.ENOENT))
    with pytest.raises(SourceNotFoundError, match="no such file"):
        read_gguf(path)
    monkeypatch.undo()
    monkeypatch.setattr(os.path, "realpath", failing(errno.EIO))
    with pytest.raises(ToolkitError, match="cannot be read: Input/output error"):
        resolve_inside(tmp_path, "file")


def test_a_header_needs_bytes_at_offsets_and_no_file(v3_folder: Path, tmp_path: Path) -> None:
    """As from another machine: what is asked for is little, and within what there is."""
    shard = sorted(v3_folder.glob("model-*.safetensors"))[0]
    write_gguf(tmp_path / "model.gguf")
    for path, whole, parse in (
        (shard, read_header(shard), header_of),
        (tmp_path / "model.gguf", read_gguf(tmp_path / "model.gguf"), gguf_of),
    ):
        content = path.read_bytes()
        asked: list[tuple[int, int]] = []

        def read(offset: int, count: int, *, content: bytes = content, asked: list[tuple[int, int]] = asked) -> bytes:
            asked.append((offset, count))
            return content[offset : offset + count]

        assert parse(Readable(what="far away", size=len(content), read=read)) == whole
        assert asked[0][0] == 0
        assert all(a + n == b for (a, n), (b, _) in pairwise(asked))  # nothing twice
        with pytest.raises(ManifestError, match="far away"):
            parse(in_memory(content[: len(whole.raw) - 1], size=len(content), what="far away"))
