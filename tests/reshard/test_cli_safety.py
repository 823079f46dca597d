"""The options that delete, continue and start again: who is asked, who is refused, what is left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import manifests
from reshard import cli_options
from reshard.journal import Journal
from reshard.progress import Progress
from reshard.restore import restore

Tree = Callable[[Path], dict[str, str]]
Program = Callable[..., Any]


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def last(result: Any) -> dict[str, Any]:
    return json.loads(result.out.splitlines()[-1])


def test_there_and_back_without_a_second_copy(
    v3_copy: Path, v3_resharded: Path, tmp_path: Path, program: Program, tree: Tree
) -> None:
    before = tree(v3_copy)
    result = program("reshard", "run", v3_copy, tmp_path / "out", "--consume", "--yes", "--json")
    assert (result.code, last(result)["kept_bytes"]) == (0, 0)
    assert not shards(v3_copy)
    assert {path for path, what in tree(v3_copy).items() if what != "folder"} == {
        path for path, what in before.items() if what != "folder" and not path.startswith("model-")
    }
    # Once more: all of it is there, and the source that is gone is not asked for.
    again = program("reshard", "run", v3_copy, tmp_path / "out", "--consume", "--yes", "--json")
    assert (again.code, last(again)["moved_bytes"]) == (0, 0)
    result = program("reshard", "restore", tmp_path / "out", tmp_path / "back", "--consume", "--yes", "-q")
    assert (result.code, result.err) == (0, "")
    assert program("reshard", "restore", v3_resharded, tmp_path / "expected", "-q").code == 0
    assert tree(tmp_path / "back") == tree(tmp_path / "expected")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run", "restore"])
def test_nobody_there_to_answer(
    command: str, v3_copy: Path, v3_resharded: Path, tmp_path: Path, program: Program, tree: Tree
) -> None:
    source = v3_copy if command == "run" else shutil.copytree(v3_resharded, tmp_path / "resharded")
    before = tree(tmp_path)
    result = program("reshard", command, source, tmp_path / "out", "--consume")
    assert result.code == 2
    assert "give --yes as well" in result.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("answer", "code"), [(True, 0), (False, 1)])
def test_the_question(
    answer: bool, code: int, v3_copy: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def confirm(text: str, **options: Any) -> bool:
        asked.append(text)
        assert options == {"err": True}
        return answer

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(cli_options.click, "confirm", confirm)
    monkeypatch.setattr(cli_options.sys, "stdin", Terminal())
    count = len(shards(v3_copy))
    assert program("reshard", "run", v3_copy, tmp_path / "out", "--consume").code == code
    assert str(v3_copy) in asked[0]
    assert len(shards(v3_copy)) == (0 if answer else count)
    assert (tmp_path / "out").exists() == answer


def test_nothing_is_freed_for_a_checkpoint_that_was_complete_before(
    v3_copy: Path, tmp_path: Path, program: Program
) -> None:
    """Nobody has compared it with this source since."""
    run, count = ("reshard", "run", v3_copy, tmp_path / "out"), len(shards(v3_copy))
    assert "nothing was freed" not in program(*run).err
    result = program(*run, "--consume", "--yes")
    assert (result.code, len(shards(v3_copy))) == (0, count)
    assert f"note: nothing was freed, for {tmp_path / 'out'} was complete before" in result.err
    result = program("reshard", "run", v3_copy, tmp_path / "new", "--consume", "--yes")
    assert (result.code, shards(v3_copy), "nothing was freed" in result.err) == (0, [], False)


@pytest.mark.parametrize("consume", [False, True])
def test_discarding_is_offered_only_where_it_is_not_refused(
    consume: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), cli_options.continuable(tmp_path, consume=consume, quiet=False):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""  # nothing to go on with
    (tmp_path / "reshard-journal.jsonl").touch()
    with pytest.raises(KeyboardInterrupt), cli_options.continuable(tmp_path, consume=consume, quiet=False):
        raise KeyboardInterrupt
    err = capsys.readouterr().err
    assert ("the same command goes on" in err, "--discard" in err) == (True, not consume)
    with pytest.raises(KeyboardInterrupt), cli_options.continuable(tmp_path, consume=consume, quiet=True):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


def test_a_part_cannot_consume(v3_copy: Path, tmp_path: Path, program: Program) -> None:
    for command in (["run", "--yes"], ["plan"]):
        result = program("reshard", *command, v3_copy, tmp_path / "out", "--consume", "--layers", "1")
        assert result.code == 2
        assert "leave out --layers and --experts" in result.err
    assert shards(v3_copy)


def test_links_are_not_consumed(v3_copy: Path, tmp_path: Path, program: Program) -> None:
    path = v3_copy / shards(v3_copy)[3]
    os.link(path, tmp_path / "second name")
    result = program("reshard", "run", v3_copy, tmp_path / "out", "--consume", "--yes")
    assert (result.code, "hard links" in result.err) == (1, True)
    assert not (tmp_path / "out").exists()
    path.unlink()
    path.symlink_to(tmp_path / "second name")
    assert program("reshard", "run", v3_copy, tmp_path / "out", "--consume", "--yes").code != 0
    assert not (tmp_path / "out").exists()


def test_plan_says_what_consuming_needs(v3_copy: Path, tmp_path: Path, program: Program) -> None:
    document = json.loads(program("reshard", "plan", v3_copy, tmp_path / "out", "--consume", "--json").out)
    assert document["needed_bytes"] == document["consume_peak_bytes"]
    plain = json.loads(program("reshard", "plan", v3_copy, tmp_path / "out", "--json").out)
    assert plain["consume_peak_bytes"] is None
    assert plain["needed_bytes"] > document["needed_bytes"]
    assert "at most" in program("reshard", "plan", v3_copy, tmp_path / "out", "--consume").out


def test_discard_starts_again(v3_copy: Path, tmp_path: Path, program: Program, tree: Tree) -> None:
    out = tmp_path / "out"
    assert program("reshard", "run", v3_copy, out, "--discard", "-q").code == 0  # nothing to discard is fine
    expected = tree(out)
    journal = '{"check":"' + "0" * 64 + '"}\n'
    (out / "manifest.json").unlink()
    (out / "reshard-journal.jsonl").write_text(journal)
    result = program("reshard", "run", v3_copy, out, "--discard", "-q")
    assert result.code == 13  # a first line that is damaged: nobody can say that nothing was freed
    shutil.rmtree(out)
    assert program("reshard", "run", v3_copy, out, "-q").code == 0
    assert tree(out) == expected


def test_check_takes_no_options_of_writing(v3_resharded: Path, program: Program) -> None:
    for option in ("--consume", "--discard", "--paranoid"):
        result = program("reshard", "restore", v3_resharded, "--check", option)
        assert result.code == 2
        assert "--check writes nothing" in result.err


def test_repair_and_its_events(
    v3_resharded: Path, v3_folder: Path, tmp_path: Path, program: Program, tree: Tree
) -> None:
    copy = shutil.copytree(v3_resharded, tmp_path / "copy")
    (copy / "layers/1/dense.safetensors").unlink()
    assert program("reshard", "verify", copy).code == 13
    result = program("reshard", "repair", copy, "--from", v3_folder, "--json")
    events = [json.loads(line) for line in result.out.splitlines()]
    assert (result.code, events[0]["event"], events[-1]["event"]) == (0, "begin", "end")
    assert [repaired["path"] for repaired in events[-1]["repaired"]] == ["layers/1/dense.safetensors"]
    assert tree(copy) == tree(v3_resharded)
    assert "nothing is damaged" in program("reshard", "repair", copy, "--from", v3_folder).out
    os.truncate(copy / "layers/1/dense.safetensors", 100)
    broken = shutil.copytree(v3_resharded, tmp_path / "broken")
    os.truncate(broken / "layers/1/dense.safetensors", 100)
    result = program("reshard", "repair", copy, "--from", broken, "--json")
    assert (result.code, len(last(result)["failures"]), result.err.count("\n")) == (13, 1, 1)


def test_a_codec_is_a_packing_behind_the_run(v3_folder: Path, tmp_path: Path, program: Program, tree: Tree) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    assert program("reshard", "run", v3_folder, plain, "-q").code == 0
    result = program("reshard", "run", v3_folder, packed, "--codec", "zstd", "--json")
    end = last(result)
    assert (result.code, end["packed_files"], end["files"]) == (0, 33, 42)
    assert [event["event"] for event in map(json.loads, result.out.splitlines())].count("end") == 1
    text = program("reshard", "run", v3_folder, tmp_path / "shown", "--codec", "zstd")
    first, second = text.out.splitlines()
    assert ("42 files" in first and "/s" in first, "33 experts are packed" in second) == (True, True)
    assert f"next: reshard restore {tmp_path}/shown --check" in text.err
    assert not list(packed.glob("layers/*/experts/*.safetensors"))
    assert program("reshard", "restore", packed, "--check", "-q").code == 0
    # Adding to it, and once more the same: a packed checkpoint is complete.
    assert program("reshard", "run", v3_folder, packed, "-q").code == 0
    assert program("reshard", "pack", packed, "-q").code == 0
    assert program("reshard", "unpack", packed, "-q").code == 0
    assert tree(packed) == tree(plain)
    part = tmp_path / "part"
    assert program("reshard", "run", v3_folder, part, "--layers", "1", "--codec", "zstd", "-q").code == 0
    result = program("reshard", "run", v3_folder, part, "--layers", "2", "-q")
    assert (result.code, "unpack" in result.err) == (1, True)


@pytest.mark.parametrize("task", ["pack", "unpack"])
def test_what_packing_left_is_never_discarded(
    task: str, v3_resharded: Path, tmp_path: Path, program: Program, tree: Tree
) -> None:
    """In that folder may be the only copy."""
    copy = shutil.copytree(v3_resharded, tmp_path / "copy")
    Journal.create(copy, {"task": task, "manifest": "0" * 64}).close()
    before = tree(copy)
    result = program("reshard", "restore", v3_resharded, copy, "--discard")
    assert (result.code, f"`reshard {task}` was interrupted here" in result.err) == (1, True)
    assert tree(copy) == before


@pytest.mark.parametrize(
    ("options", "spoil", "code"),
    [
        (["--consume"], None, 2),  # nobody is there to answer
        (["--layers", "99"], None, 2),
        (["--dry-run"], None, 2),
        ([], "config.json", 12),
        ([], "model-00003-of-000047.safetensors", 12),
        ([], None, 0),
    ],
)
def test_nothing_is_discarded_for_a_command_that_is_refused(
    options: list[str], spoil: str | None, code: int, v3_copy: Path, v3_resharded: Path, tmp_path: Path,
    program: Program, reshard_folder: Callable[..., Path], stop_after: Any, tree: Tree,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with stop_after(5):
        reshard_folder(v3_copy, out, jobs=1)
    if spoil is not None:
        os.truncate(v3_copy / spoil, 0)
    before = tree(out)
    result = program("reshard", "run", v3_copy, out, "--discard", *options)
    assert (result.code, result.err.count("Traceback")) == (code, 0)
    assert tree(out) == (before if code else tree(v3_resharded))


@pytest.mark.parametrize(("options", "code"), [(["--consume"], 2), ([], 10)])
def test_nothing_is_discarded_for_a_restore_that_is_refused(
    options: list[str], code: int, resharded_copy: Path, tmp_path: Path, program: Program, stop_after: Any, tree: Tree
) -> None:
    out = tmp_path / "out"
    with stop_after(5), Progress(0, label="", quiet=True) as progress:
        restore(manifests.open(resharded_copy), out, jobs=1, progress=progress)
    lost = resharded_copy / "layers/1/experts/03.safetensors"
    if not options:
        lost.rename(tmp_path / "elsewhere")
    before = tree(out)
    result = program("reshard", "restore", resharded_copy, out, "--discard", *options)
    assert (result.code, tree(out)) == (code, before)
    if not options:
        assert f"{resharded_copy}: has no layers/1/experts/03.safetensors" in result.err
        (tmp_path / "elsewhere").rename(lost)
    assert program("reshard", "restore", resharded_copy, out, "--discard").code == 0
