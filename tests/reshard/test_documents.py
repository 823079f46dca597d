"""The files beside the tensors: written once, kept when they are right, replaced when they are not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests.schema import Document
from reshard.archive import unpack
from reshard.documents import header_paths, write_index, write_kept
from reshard.source import SourceCheckpoint, read_source

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(v2_folder: Path) -> SourceCheckpoint:
    return read_source(v2_folder)


def test_numbers_are_as_wide_as_they_must_be() -> None:
    assert header_paths(["b", "a"]) == {"b": "source/headers/1.zst", "a": "source/headers/2.zst"}
    for count, first in ((9, "1"), (10, "01"), (99, "01"), (163, "001")):
        paths = header_paths(f"shard{number}" for number in range(count))
        assert next(iter(paths.values())) == f"source/headers/{first}.zst"
        assert list(paths.values()) == sorted(paths.values())


def test_all_that_is_kept(source: SourceCheckpoint, v2_folder: Path, v2_resharded: Path, tmp_path: Path) -> None:
    documents = write_kept(source, tmp_path)
    # What a whole run names in its manifest, but for our own index.
    manifest = manifests.load(v2_resharded)
    assert sorted(documents, key=lambda document: document.path) == [
        document for document in manifest.documents if document.role != "index"
    ]
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        document.path for document in documents
    }
    for document in documents:
        raw = (tmp_path / document.path).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (document.size, document.sha256)
        content = raw if document.codec == "none" else unpack(raw, size=document.content_size, what="")
        assert hashlib.sha256(content).hexdigest() == document.content_sha256
        if document.role != "source_header":
            assert document.source_name is not None
            assert content == (v2_folder / document.source_name).read_bytes()
        else:
            assert content == source.shards[str(document.source_name)].raw


def test_a_second_time_nothing_is_written(source: SourceCheckpoint, tmp_path: Path, stamps: Any) -> None:
    first = write_kept(source, tmp_path)
    before = stamps(tmp_path)
    assert write_kept(source, tmp_path) == first
    assert stamps(tmp_path) == before


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "gone": lambda path: path.unlink(), "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"),
    "unfinished": lambda path: path.rename(f"{path}.partial"),
}  # fmt: skip


@pytest.mark.parametrize("path", ["config.json", "source/headers/2.zst", "source/index.json.zst", "empty.txt"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_not_right_is_written_again(
    source: SourceCheckpoint, tmp_path: Path, path: str, damage: Callable[[Path], Any], tree: Any
) -> None:
    if path == "empty.txt" and damage is DAMAGE["cut"]:
        return
    first = write_kept(source, tmp_path)
    before = tree(tmp_path)
    damage(tmp_path / path)
    assert write_kept(source, tmp_path) == first
    assert tree(tmp_path) == before


def test_small_files_that_changed_since(v2_copy: Path, tmp_path: Path) -> None:
    """Of a run that went on: what is there now counts."""
    write_kept(read_source(v2_copy), tmp_path / "out")
    (v2_copy / "config.json").write_text('{"model_type": "deepseek_v2", "num_hidden_layers": 2}')
    documents = write_kept(read_source(v2_copy), tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (v2_copy / "config.json").read_bytes()
    raw = (v2_copy / "config.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() in {document.sha256 for document in documents}


def test_links_are_followed(v2_copy: Path, tmp_path: Path) -> None:
    (v2_copy / "config.json").rename(v2_copy / "real.json")
    (v2_copy / "config.json").symlink_to("real.json")
    write_kept(read_source(v2_copy), tmp_path / "out")
    assert not (tmp_path / "out/config.json").is_symlink()
    assert (tmp_path / "out/config.json").read_bytes() == (v2_copy / "real.json").read_bytes()


def test_the_index(tmp_path: Path, stamps: Any) -> None:
    files = [("layers/1/a.safetensors", [("b", 3), ("\u2581", 5)]), ("layers/0/b.safetensors", [("a", 0)])]
    document = write_index(files, tmp_path)
    raw = (tmp_path / INDEX).read_bytes()
    assert json.loads(raw) == {
        "metadata": {"total_size": 8},
        "weight_map": {
            "a": "layers/0/b.safetensors",
            "b": "layers/1/a.safetensors",
            "\u2581": "layers/1/a.safetensors",
        },
    }
    sha256 = hashlib.sha256(raw).hexdigest()
    assert document == Document(
        path=INDEX, role="index", size=len(raw), sha256=sha256, content_size=len(raw), content_sha256=sha256,
        source_name=None,
    )  # fmt: skip
    before = stamps(tmp_path)
    assert write_index(reversed(files), tmp_path) == document
    assert stamps(tmp_path) == before
    assert write_index(files[:1], tmp_path) != document


def test_what_stands_in_the_way_of_a_temporary_file(source: SourceCheckpoint, tmp_path: Path) -> None:
    """Left by a kill: taken away, and not gone on with."""
    for path in ("config.json", "source/headers/1.zst"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{path}.partial").write_bytes(b"x" * 100_000)
    write_kept(source, tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / "config.json").read_bytes() == (source.root / "config.json").read_bytes()
