"""The corpus of bad input: each folder of bad/ has one fault, and every command ends with one sentence about it.

bad/cases.json is the table: for each case the exit code of each command and a piece of what it must say.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BAD = Path(__file__).parent / "bad"
TABLE = json.loads((BAD / "cases.json").read_text(encoding="utf-8"))
CASES = [(kind, name) for kind, group in TABLE.items() for name in group["cases"]]
INDEX = "model.safetensors.index.json"

Program = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[name for _, name in CASES])
def test_each_fault_is_one_sentence_and_leaves_nothing(
    kind: str, name: str, tmp_path: Path, program: Program, tree: Tree
) -> None:
    folder = shutil.copytree(BAD / name, tmp_path / "checkpoint")
    before = tree(tmp_path)
    exits, says = TABLE[kind]["cases"][name]
    for command, code in zip(TABLE[kind]["commands"], exits, strict=True):
        arguments = [*command.split(), folder]
        if command in ("reshard run", "reshard restore"):
            arguments.append(tmp_path / "new" / "out")
        result = program(*arguments)
        assert result.code == code, f"{command}: {result}"
        if code:
            # What verify finds is data; what to do about it is talk.
            said = result.out if result.err.startswith("next: ") else result.err or result.out
            assert says in said, f"{command}: {result}"
            if said == result.err:
                assert result.out == ""
                assert result.err.startswith(f"{arguments[0]}: ")
                assert result.err.count("\n") == 1
            assert "\x1b" not in said
            assert tree(tmp_path) == before, command
    if not any(exits):
        assert (tmp_path / "new" / "out").is_dir()


def test_the_corpus_is_what_its_script_makes(tmp_path: Path, tree: Tree) -> None:
    spec = importlib.util.spec_from_file_location("make_bad", BAD / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.build(tmp_path)
    made, kept = tree(tmp_path), tree(BAD)
    assert made == {
        path: what for path, what in kept.items() if path.split("/")[0] not in ("make.py", "cases.json", "__pycache__")
    }
    assert {path.name for path in tmp_path.iterdir()} == {name for _, name in CASES}


def test_the_terminal_sees_the_same(tmp_path: Path) -> None:
    """Through the real entry point: no traceback, nothing on stdout."""
    result = subprocess.run(
        [sys.executable, "-m", "reshard", "run", str(BAD / "shard_truncated"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (12, "")
    assert result.stderr.count("\n") == 1
    assert "truncated" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return shutil.copytree(BAD / "good_source", tmp_path / "source")


SHARD = "model-00002-of-000002.safetensors"


@pytest.mark.parametrize("name", [SHARD, "config.json", INDEX, "LICENSE"])
@pytest.mark.parametrize("target", ["outside", "/etc/hostname", "../source/../outside"])
def test_links_that_leave_the_folder(
    source: Path, name: str, target: str, tmp_path: Path, program: Program, tree: Tree
) -> None:
    if (source / name).exists():
        shutil.move(source / name, tmp_path / "outside")
    else:
        (tmp_path / "outside").write_text("text")
    (source / name).symlink_to(tmp_path / "outside" if target == "outside" else target)
    before = tree(tmp_path)
    result = program("reshard", "run", source, tmp_path / "out")
    assert (result.code, result.out) == (12, "")
    assert "leaves the folder" in result.err
    assert tree(tmp_path) == before


def test_a_link_to_a_folder_is_left_out_and_said_so(source: Path, tmp_path: Path, program: Program) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (source / "docs").symlink_to(tmp_path / "outside")
    (source / "loop").symlink_to(".")
    result = program("reshard", "run", source, tmp_path / "out")
    assert result.code == 0
    assert "docs (link to a folder), loop (link to a folder)" in result.err
    assert not any("secret" in path.name for path in (tmp_path / "out").rglob("*"))


def test_links_inside_the_folder_are_copied_as_files(
    source: Path, tmp_path: Path, program: Program, tree: Tree
) -> None:
    (source / "blobs").mkdir()
    shutil.move(source / SHARD, source / "blobs" / "b")
    (source / SHARD).symlink_to("blobs/b")
    (source / "README").symlink_to("config.json")
    assert program("reshard", "run", source, tmp_path / "out").code == 0
    assert program("reshard", "restore", tmp_path / "out", tmp_path / "back").code == 0
    assert (tmp_path / "back" / SHARD).read_bytes() == (source / SHARD).read_bytes()
    assert not (tmp_path / "back" / SHARD).is_symlink()
    assert (tmp_path / "back" / "README").read_bytes() == (source / "config.json").read_bytes()


def test_the_hub_caches_layout_is_resharded_and_restored(
    source: Path, tmp_path: Path, program: Program, tree: Tree
) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    assert program("reshard", "run", snapshot, tmp_path / "out").code == 0
    assert program("reshard", "verify", tmp_path / "out", "--against", snapshot).code == 0
    assert program("reshard", "restore", tmp_path / "out", tmp_path / "back").code == 0
    assert tree(tmp_path / "back") == tree(source)


@pytest.mark.parametrize("name", [SHARD, "config.json", INDEX, "LICENSE"])
def test_a_fifo_does_not_hang(source: Path, name: str, tmp_path: Path, program: Program, deadline: None) -> None:
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    result = program("reshard", "run", source, tmp_path / "out")
    if name == "LICENSE":
        # Nothing to do with the checkpoint: left out, and said so.
        assert result.code == 0
        assert "'LICENSE' (not a regular file)" in result.err
        return
    assert (result.code, result.out, result.err.count("\n")) == (10, "", 1)
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_fifo_does_not_hang(source: Path, tmp_path: Path, program: Program, deadline: None) -> None:
    os.mkfifo(source / "fifo")
    (source / "NOTES").symlink_to("fifo")
    result = program("reshard", "run", source, tmp_path / "out")
    assert result.code == 10
    assert "NOTES: not a regular file" in result.err


def test_a_dangling_link_is_named(source: Path, tmp_path: Path, program: Program) -> None:
    (source / "NOTES").symlink_to("nowhere")
    result = program("reshard", "run", source, tmp_path / "out")
    assert result.code == 10
    assert "NOTES: no such file" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Config.json", "MODEL.safetensors.index.json", "Manifest.JSON"])
def test_names_that_differ_in_case_alone(source: Path, name: str, tmp_path: Path, program: Program) -> None:
    """The result could not be read on every file system, and our own reader refuses such a manifest."""
    (source / name).write_text("{}")
    result = program("reshard", "run", source, tmp_path / "out")
    assert result.code == 12
    assert "differ in case alone" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["Layers", "SOURCE", "model"])
def test_auxiliary_files_stay_out_of_our_folders(source: Path, folder: str, tmp_path: Path, program: Program) -> None:
    (source / folder / "deep").mkdir(parents=True)
    (source / folder / "deep" / "x.txt").write_text("x")
    result = program("reshard", "run", source, tmp_path / "out")
    assert result.code == 12
    assert f"needs the folder '{folder}' itself" in result.err


def test_leftovers_of_an_unfinished_write_are_left_out(source: Path, tmp_path: Path, program: Program) -> None:
    """Our own temporary names would collide with them."""
    for name in ("manifest.json.partial", f"{INDEX}.partial", "config.json.partial"):
        (source / name).write_text("half")
    result = program("reshard", "run", source, tmp_path / "out")
    assert result.code == 0
    assert result.err.count("(an unfinished file)") == 3
    assert program("reshard", "verify", tmp_path / "out").code == 0
    assert not list((tmp_path / "out").glob("*.partial"))


def test_names_that_no_terminal_should_see(source: Path, tmp_path: Path, program: Program) -> None:
    (source / "a\x1b[2Jb.txt").write_text("x")
    os.close(os.open(os.fsencode(source) + b"/\xff\xfe.txt", os.O_CREAT))
    (source / "back\\slash").write_text("x")
    result = program("reshard", "run", source, tmp_path / "out")
    assert result.code == 0
    assert "\x1b" not in result.err
    assert result.err.count("a control character)") == 3
    assert program("reshard", "verify", tmp_path / "out").code == 0


def test_a_folder_that_cannot_be_read_is_not_passed_over(
    source: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "docs").mkdir()
    (source / "docs" / "guide.txt").write_text("x")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("docs"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = program("reshard", "run", source, tmp_path / "out")
    assert (result.code, result.err) == (1, f"reshard: {source}/docs: Permission denied\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts", "num_experts_per_tok", "model_type"])
@pytest.mark.parametrize("value", ["1" + "0" * 30, "-1", "true", "null", "[]", '"' + "x" * 5000 + '"', "1.5"])
def test_a_config_of_nonsense_never_makes_an_unreadable_manifest(
    source: Path, key: str, value: str, tmp_path: Path, program: Program
) -> None:
    (source / "config.json").write_text(f'{{"{key}": {value}}}')
    assert program("reshard", "run", source, tmp_path / "out").code == 0
    assert program("manifests", "check", tmp_path / "out").code == 0
