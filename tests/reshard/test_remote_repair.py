"""Repair and verify with a source on a web server: what is damaged is fetched, and no more."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests import patience
from manifests.paths import MANIFEST_NAME
from manifests.schema import TensorEntry
from tests import wrong_answers
from tests.fake_hub import NAME, fake_hub
from tests.file_server import Answer, Asked, FileServer, serve

Program = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]

EXPERT = "layers/2/experts/04.safetensors"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("manifests.shards.FIRST_BYTES", 8)


@pytest.fixture
def shards(v3_folder: Path) -> Iterator[FileServer]:
    with serve(v3_folder) as server:
        yield server


@pytest.fixture
def copy(v3_resharded: Path) -> Iterator[FileServer]:
    with serve(v3_resharded) as server:
        yield server


def flip(path: Path, at: int) -> None:
    with path.open("rb+") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def damage(folder: Path) -> TensorEntry:
    """Flip a bit of one tensor; return it."""
    (file,) = [file for file in manifests.open(folder).manifest.files if file.path == EXPERT]
    tensor = file.tensors[1]
    flip(folder / EXPERT, tensor.offset + 5)
    return tensor


def payload_bytes(server: FileServer) -> int:
    """What was sent of files with tensors behind their headers."""
    total = 0
    for name, spans in server.spans.items():
        if name.endswith(".safetensors"):
            header = 8 + int.from_bytes((server.root / name).read_bytes()[:8], "little")
            total += sum(max(0, end - max(begin, header)) for begin, end in spans)
    return total


@pytest.mark.parametrize("which", ["shards", "copy"])
def test_only_the_damaged_tensor_is_fetched(
    which: str, request: pytest.FixtureRequest, resharded_copy: Path, v3_resharded: Path, program: Program, tree: Tree
) -> None:
    server: FileServer = request.getfixturevalue(which)
    tensor = damage(resharded_copy)
    repaired = program("reshard", "repair", resharded_copy, "--from", server.url)
    assert repaired.code == 0, repaired.err
    assert f"{EXPERT}: repaired, " in repaired.out
    assert server.url in repaired.out
    assert tree(resharded_copy) == tree(v3_resharded)
    assert payload_bytes(server) == tensor.size


@pytest.mark.parametrize("which", ["shards", "copy"])
def test_documents_headers_and_lost_files(
    which: str, request: pytest.FixtureRequest, resharded_copy: Path, v3_resharded: Path, program: Program, tree: Tree
) -> None:
    server: FileServer = request.getfixturevalue(which)
    flip(resharded_copy / EXPERT, 20)
    (resharded_copy / "config.json").unlink()
    flip(resharded_copy / "tokenizer.json", 3)
    flip(resharded_copy / "source/headers/07.zst", 9)
    flip(resharded_copy / "source/index.json.zst", 9)
    shutil.rmtree(resharded_copy / "layers" / "1" / "experts")
    repaired = program("reshard", "repair", resharded_copy, "--from", server.url)
    assert repaired.code == 0, repaired.err
    assert tree(resharded_copy) == tree(v3_resharded)


def test_a_damaged_manifest_is_taken_from_a_copy(
    copy: FileServer, shards: FileServer, resharded_copy: Path, v3_resharded: Path, program: Program, tree: Tree
) -> None:
    flip(resharded_copy / MANIFEST_NAME, 100)
    refused = program("reshard", "repair", resharded_copy, "--from", shards.url)
    assert refused.code == 12
    assert "is not resharded" in refused.err
    assert program("reshard", "repair", resharded_copy, "--from", copy.url).code == 0
    assert tree(resharded_copy) == tree(v3_resharded)


def test_wrong_bytes_from_the_server_are_not_taken(
    shards: FileServer, resharded_copy: Path, program: Program, tree: Tree
) -> None:
    damage(resharded_copy)
    before = tree(resharded_copy)

    def turn(asked: Asked, right: Answer) -> Answer | None:
        if asked.span is None or asked.span[0] == 0 or asked.name.endswith(".json"):
            return None
        return replace(right, body=right.body[::-1])

    shards.instead = turn
    refused = program("reshard", "repair", resharded_copy, "--from", shards.url)
    assert refused.code in (12, 13)
    assert tree(resharded_copy) == before


@pytest.fixture
def packed(v3_resharded: Path, tmp_path: Path, program: Program) -> Iterator[FileServer]:
    folder = shutil.copytree(v3_resharded, tmp_path / "packed")
    assert program("reshard", "pack", folder).code == 0
    with serve(folder) as server:
        yield server


def test_a_packed_copy_on_a_server_gives_what_is_damaged(
    packed: FileServer, resharded_copy: Path, v3_resharded: Path, program: Program, tree: Tree
) -> None:
    damage(resharded_copy)
    repaired = program("reshard", "repair", resharded_copy, "--from", packed.url)
    assert repaired.code == 0, repaired.err
    assert tree(resharded_copy) == tree(v3_resharded)
    # All of the one expert, and of the others nothing.
    assert packed.root is not None
    assert packed.sent(".zst") == (packed.root / f"{EXPERT}.zst").stat().st_size


def test_a_packed_copy_on_a_server_repairs_a_packed_one(
    packed: FileServer, tmp_path: Path, program: Program, tree: Tree
) -> None:
    assert packed.root is not None
    mine = shutil.copytree(packed.root, tmp_path / "mine")
    flip(mine / f"{EXPERT}.zst", 1000)
    assert program("reshard", "repair", mine, "--from", packed.url).code == 0
    assert tree(mine) == tree(packed.root)


def test_a_packed_copy_on_a_server_that_is_damaged_itself(
    packed: FileServer, resharded_copy: Path, program: Program, tree: Tree
) -> None:
    damage(resharded_copy)
    before = tree(resharded_copy)
    packed.instead = wrong_answers.flip(f"{EXPERT}.zst", 1000)
    refused = program("reshard", "repair", resharded_copy, "--from", packed.url)
    assert refused.code == 13
    assert f"{EXPERT}" in refused.err
    assert tree(resharded_copy) == before


def test_verify_against_a_server_compares_what_it_says(
    shards: FileServer, resharded_copy: Path, program: Program
) -> None:
    said = program("reshard", "verify", resharded_copy, "--against", shards.url)
    assert said.code == 0, said.err
    assert "no sha256 is published" in said.err
    assert payload_bytes(shards) == 0


def test_verify_against_a_resharded_copy_of_a_server(copy: FileServer, resharded_copy: Path, program: Program) -> None:
    refused = program("reshard", "verify", resharded_copy, "--against", copy.url)
    assert refused.code == 12
    assert "is resharded itself" in refused.err
    assert refused.out == ""


def test_verify_against_the_hub_compares_published_digests(
    shards: FileServer, resharded_copy: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_hub(shards.root, shards.url, monkeypatch) as hub:
        said = program("reshard", "verify", resharded_copy, "--against", NAME)
        assert said.code == 0, said.err
        assert "published" not in said.err
        assert shards.sent(".safetensors") == 0
        real, shard = hub.published, sorted(shards.root.glob("model-*.safetensors"))[3]
        hub.published = lambda path: "0" * 64 if path == shard else real(path)
        said = program("reshard", "verify", resharded_copy, "--against", NAME)
    assert said.code == 13
    assert f"{shard.name}: bytes 0-{shard.stat().st_size}: the published sha256 is 0000" in said.out


def test_verify_against_another_model(v2_folder: Path, resharded_copy: Path, program: Program) -> None:
    with serve(v2_folder) as server:
        said = program("reshard", "verify", resharded_copy, "--against", server.url)
    assert said.code == 13
    assert "the server has no such file" in said.out
    assert "config.json" in said.out
