"""Resharding GGUF models from a web server: the bytes of a local copy, gaps between tensors included."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from manifests.folder import LocalFolder
from manifests.gguf_files import read_folder, with_gaps
from manifests.paths import JOURNAL_NAME
from tests.fake_hub import NAME, fake_hub
from tests.file_server import FileServer, no_fault, serve
from tests.gguf_files import write_gguf
from tests.reshard.test_remote_run import SMALL
from tests.wrong_answers import gone_after

Program = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file and a set, with gaps and tensors of several chunks."""
    (tmp_path / "served" / "set").mkdir(parents=True)

    def align(writer: gguf.GGUFWriter) -> None:
        # Wider than the tensors' own sizes, so that there are gaps.
        writer.add_custom_alignment(1024)

    write_gguf(tmp_path / "served" / "one.gguf", tokenizer=align)
    write_gguf(tmp_path / "served" / "set" / "x.gguf", new=False, split_max_tensors=15)
    (tmp_path / "served" / "set" / "LICENSE").write_text("as you like")
    return tmp_path / "served"


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """It, on a server, in small parts and segments."""
    reads = {"manifests.gguf.READ_BYTES": 512, "manifests.gguf_files.READ_BYTES": 512}
    for name, value in (SMALL | reads).items():
        monkeypatch.setattr(name, value)
    with serve(folder) as found:
        yield found


def first_of(folder: Path) -> str:
    return sorted(path.name for path in (folder / "set").glob("*.gguf"))[0]


@pytest.mark.parametrize("jobs", [1, 8])
@pytest.mark.parametrize("name", ["one.gguf", "set"])
def test_the_result_is_that_of_a_local_copy(
    server: FileServer, folder: Path, tmp_path: Path, program: Program, tree: Tree, name: str, jobs: int
) -> None:
    path = folder / (name if name != "set" else f"set/{first_of(folder)}")
    url = f"{server.url}/{path.relative_to(folder)}"
    assert program("reshard", "run", path, tmp_path / "here").code == 0
    found = program("reshard", "run", url, tmp_path / "there", "--jobs", str(jobs))
    assert found.code == 0, found.err
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    restored = program("reshard", "restore", tmp_path / "there", tmp_path / "back")
    assert restored.code == 0
    expected = {n: d for n, d in tree(path.parent).items() if n.endswith(".gguf") and (name == "set" or n == name)}
    assert {n: d for n, d in tree(tmp_path / "back").items() if n.endswith(".gguf")} == expected


def test_a_part_alone_is_fetched(
    server: FileServer, folder: Path, tmp_path: Path, program: Program, tree: Tree
) -> None:
    selection = ["--layers", "1", "--experts", "0,3"]
    assert program("reshard", "run", folder / "one.gguf", tmp_path / "here", *selection).code == 0
    server.forget()
    assert program("reshard", "run", f"{server.url}/one.gguf", tmp_path / "there", *selection).code == 0
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert server.sent() < (folder / "one.gguf").stat().st_size * 0.7


@pytest.mark.parametrize("answers", [8, 15, 22])
def test_stopped_it_goes_on_within_the_file(
    server: FileServer, folder: Path, tmp_path: Path, program: Program, tree: Tree, answers: int
) -> None:
    """Its own sha256 is of the gaps, too, in their places: also between what is read back and what is fetched."""
    (header,) = read_folder(LocalFolder(folder), ["one.gguf"]).shards.values()
    header = with_gaps(LocalFolder(folder), "one.gguf", header)
    assert len(header.gaps) > 5
    assert program("reshard", "run", folder / "one.gguf", tmp_path / "here").code == 0
    url, payload = f"{server.url}/one.gguf", len(header.raw)
    server.instead = gone_after(
        len(header.gaps) + answers, lambda asked: asked.span is not None and asked.span[0] >= payload
    )
    stopped = program("reshard", "run", url, tmp_path / "there", "--jobs", "2")
    assert stopped.code == 1, stopped.err
    assert (tmp_path / "there" / JOURNAL_NAME).exists()
    server.instead = no_fault
    server.forget()
    found = program("reshard", "run", url, tmp_path / "there", "--jobs", "2")
    assert found.code == 0, found.err
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_plan_says_what_was_named(server: FileServer, folder: Path, program: Program) -> None:
    url = f"{server.url}/set/{first_of(folder)}"
    plan = program("reshard", "plan", url, "--json").json
    assert plan["source"] == url
    assert plan["generated"]
    assert plan["auxiliary"] == [], "nothing beside a file that was named is taken"
    missing = program("reshard", "plan", f"{server.url}/none.gguf")
    assert missing.code == 10
    assert missing.err == f"reshard: {server.url}/none.gguf: the server has no such file\n"


def test_verify_and_repair(server: FileServer, folder: Path, tmp_path: Path, program: Program, tree: Tree) -> None:
    first = first_of(folder)
    out, url = tmp_path / "out", f"{server.url}/set/{first}"
    assert program("reshard", "run", folder / "set" / first, out).code == 0
    before = tree(out)
    server.forget()
    assert program("reshard", "verify", out, "--against", url).code == 0
    assert server.sent() < sum(path.stat().st_size for path in (folder / "set").glob("*.gguf")) / 2
    other = program("reshard", "verify", out, "--against", f"{server.url}/one.gguf")
    assert other.code == 1
    assert f"one.gguf: is none of the files that {out} was made from; give its {first}" in other.err
    (out / "layers" / "2" / "experts" / "3.safetensors").unlink()
    (out / "config.json").write_text("{}")
    repaired = program("reshard", "repair", out, "--from", url)
    assert repaired.code == 0, repaired.err
    assert tree(out) == before


def test_of_the_hub_the_published_digest_is_held_to(
    server: FileServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Program, tree: Tree
) -> None:
    with fake_hub(folder, server.url, monkeypatch) as hub:
        found = program("reshard", "run", f"{NAME}/set", tmp_path / "there")
        assert found.code == 0, found.err
        assert program("reshard", "run", folder / "set", tmp_path / "here").code == 0
        assert tree(tmp_path / "there") == tree(tmp_path / "here")
        assert (tmp_path / "there" / "LICENSE").read_text() == "as you like"
        verified = program("reshard", "verify", tmp_path / "there", "--against", f"{NAME}/set/{first_of(folder)}")
        assert verified.code == 0, verified.err
        hub.published = lambda _: "0" * 64
        shutil.rmtree(tmp_path / "there")
        refused = program("reshard", "run", f"{NAME}/one.gguf", tmp_path / "there")
        assert refused.code == 13
        assert "sha256" in refused.err
