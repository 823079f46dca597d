"""GGUF models on web servers and on the Hub: described as on this machine, from their headers alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests import inventory, patience
from manifests.errors import IntegrityError, ManifestError, SourceNotFoundError
from tests.fake_hub import NAME, fake_hub
from tests.file_server import Answer, Asked, FileServer, serve
from tests.gguf_files import CONFIG, write_gguf
from tests.gguf_tokenizers import TRAINING, add_tokenizer, train

Program = Callable[..., Any]

BLOCK_BYTES = 512


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file, a set of three, and something else."""
    (tmp_path / "served" / "set").mkdir(parents=True)
    config, tokens = CONFIG | {"vocab_size": 1300}, train("deepseek-v3", TRAINING)
    for name, options in (("one", {}), ("set/x", {"split_max_tensors": 20})):
        source = tmp_path / f"tokenizer of {name[:3]}"

        def tokenizer(writer: Any, source: Path = source) -> None:
            add_tokenizer(writer, source, tokens, "deepseek-v3", rows=1300)

        write_gguf(tmp_path / "served" / f"{name}.gguf", config, tokenizer=tokenizer, **options)
    (tmp_path / "served" / "set" / "README.md").write_text("not a model")
    return tmp_path / "served"


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """It, on a server; headers are longer than what is asked for at once."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("manifests.gguf.READ_BYTES", BLOCK_BYTES)
    monkeypatch.setattr("manifests.gguf_files.READ_BYTES", BLOCK_BYTES)
    with serve(folder) as found:
        yield found


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "set").glob("*.gguf"))


def described(checkpoint: manifests.Checkpoint) -> tuple[Any, ...]:
    small = {
        name: checkpoint.auxiliary.read(name, max_bytes=1 << 24) for name in ("tokenizer.json", "tokenizer_config.json")
    }
    return checkpoint.manifest, dict(checkpoint.config), small


def test_a_file_is_what_it_is_here(server: FileServer, folder: Path, program: Program) -> None:
    url = f"{server.url}/one.gguf"
    listed = program("manifests", "ls", url, "--json").json
    assert listed == [row | {"place": url} for row in program("manifests", "ls", folder / "one.gguf", "--json").json]
    assert program("manifests", "check", url).code == 0
    equal = program("manifests", "diff", url, folder / "one.gguf")
    assert (equal.code, equal.out) == (3, "")
    header = len(
        next(iter(inventory.gguf_files.read_file(inventory.LocalFolder(folder), "one.gguf").shards.values())).raw
    )
    assert header > 3 * BLOCK_BYTES
    assert max(end for _, end in server.spans["one.gguf"]) < header + BLOCK_BYTES


def test_bytes_are_those_of_the_file(server: FileServer, folder: Path) -> None:
    here, there = manifests.open(folder / "one.gguf"), manifests.open(f"{server.url}/one.gguf")
    for number in (0, 4):
        expected = {name: bytes(view.data) for name, view in here.expert(1, number).items()}
        assert {name: bytes(view.data) for name, view in there.expert(1, number).items()} == expected
    assert len(expected) == 3


@pytest.mark.parametrize("number", [0, 2])
def test_any_file_of_a_set_stands_for_it(server: FileServer, folder: Path, number: int) -> None:
    names = parts(folder)
    assert len(names) == 3
    expected = described(manifests.open(folder / "set"))
    for opened in (inventory.open_model, inventory.open_set):
        server.forget()
        found = opened(f"{server.url}/set/{names[number]}")
        spans = server.spans[f"set/{names[number]}"]
        assert len(set(spans)) == len(spans), "its header was fetched twice"
        assert described(found) == expected
        assert found.folder.where(names[1]) == f"{server.url}/set/{names[1]}"


def test_a_file_of_a_set_alone(server: FileServer, folder: Path) -> None:
    names = parts(folder)
    alone = manifests.open(f"{server.url}/set/{names[1]}")
    assert {location.file for location in alone.tensors()} == {names[1]}
    (folder / "set" / names[2]).unlink()
    assert inventory.open_set(f"{server.url}/set/{names[1]}").manifest == alone.manifest
    with pytest.raises(SourceNotFoundError, match=f"1 of 3 files of a split model are missing, first {names[2]}"):
        inventory.open_model(f"{server.url}/set/{names[1]}")


def test_the_header_is_read_with_the_gaps(server: FileServer, folder: Path) -> None:
    """Padding is asked for by itself, and only where there is some."""
    remote_folder, name = inventory.remote.find(f"{server.url}/one.gguf")
    assert name == "one.gguf"
    local = inventory.LocalFolder(folder)
    (here,) = inventory.gguf_files.read_file(local, name).shards.values()
    (there,) = inventory.gguf_files.read_file(remote_folder, name).shards.values()
    server.forget()
    whole = inventory.gguf_files.with_gaps(remote_folder, name, there)
    assert whole == inventory.gguf_files.with_gaps(local, name, here)
    assert whole.gaps
    assert sum(len(gap.content) for gap in whole.gaps) + 1 == server.sent()


def test_a_folder_of_which_nobody_lists_the_files(server: FileServer, program: Program) -> None:
    found = program("manifests", "show", f"{server.url}/set")
    assert found.code == 10
    assert found.err.endswith("; of a GGUF model give the address of the file\n")


def test_on_the_hub(server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    """A folder of a repository with one model, one file of several, and what is not there."""
    with fake_hub(folder, server.url, monkeypatch):
        expected = described(manifests.open(folder / "set"))
        assert described(manifests.open(f"{NAME}/set")) == expected
        names = parts(folder)
        assert described(inventory.open_model(f"{NAME}@v1/set/{names[2]}")) == expected
        assert described(manifests.open(f"{NAME}/one.gguf")) == described(manifests.open(folder / "one.gguf"))
        assert described(manifests.open(NAME)) == described(manifests.open(f"{NAME}/one.gguf"))
        shutil.copy(folder / "one.gguf", folder / "two.gguf")
        for name, says in (
            (NAME, "2 .gguf files that are not one model; name one file"),
            (f"{NAME}/three.gguf", "the repository has no such file or folder"),
            (f"{NAME}/set/README.md", "not a .safetensors or .gguf file and not a folder"),
        ):
            refused = program("manifests", "show", name)
            assert (refused.code, says in refused.err) == (10, True), refused.err


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda _: b"<html>sign in</html>", ManifestError, "does not start with 'GGUF'"),
        (lambda raw: raw[:700], ManifestError, "too short; it is truncated"),
        (lambda raw: raw[:-1], ManifestError, "truncated"),
        (lambda _: None, SourceNotFoundError, "the server has no such file"),
    ],
)
def test_what_is_no_model(
    server: FileServer, folder: Path, change: Callable[[bytes], bytes | None], error: type[Exception], says: str
) -> None:
    path = folder / "one.gguf"
    changed = change(path.read_bytes())
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    with pytest.raises(error, match=rf"^{server.url}/one\.gguf: .*{says}"):
        manifests.open(f"{server.url}/one.gguf")


def test_a_file_that_changes_between_two_blocks_is_refused(server: FileServer) -> None:
    def other(asked: Asked, right: Answer) -> Answer | None:
        begin = (asked.span or (0, 0))[0]
        return replace(right, headers=right.headers | {"ETag": '"other"'}) if begin else None

    server.instead = other
    with pytest.raises(IntegrityError, match="changed on the server since it was first read"):
        manifests.open(f"{server.url}/one.gguf")
