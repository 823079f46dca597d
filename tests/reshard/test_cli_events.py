"""The lines that `--json` of `run`, `verify` and `restore` prints, and what happens when nobody takes them."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import ToolkitError
from reshard import progress
from reshard.cli_events import EventStream
from reshard.progress import Progress

Program = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]


def events(out: str) -> list[Any]:
    """All lines, each of them a document."""
    assert out.isascii()
    assert out.endswith("\n")
    found = [json.loads(line) for line in out.splitlines()]
    assert all(next(iter(event)) == "event" for event in found)
    return found


def kinds(out: str) -> list[str]:
    return [event["event"] for event in events(out)]


@pytest.fixture(autouse=True)
def _tell_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints here are moved in less than a second."""
    monkeypatch.setattr(progress, "EVENT_SECONDS", 1e-6)


def test_a_run_from_begin_to_end(program: Program, v3_folder: Path, tmp_path: Path) -> None:
    result = program("reshard", "run", v3_folder, tmp_path / "out", "--json")
    assert (result.code, result.err) == (0, "")
    found = events(result.out)
    begin, *between, end = found
    assert begin.keys() == {"event", "command", "source", "path", "shards", "files", "total_bytes"}
    assert (begin["event"], begin["command"], begin["path"]) == ("begin", "run", str(tmp_path / "out"))
    assert {event["event"] for event in between} == {"progress", "shard", "remark"}
    shards = [event for event in between if event["event"] == "shard"]
    assert {event["name"] for event in shards} == {path.name for path in v3_folder.glob("model-*.safetensors")}
    assert len(shards) == begin["shards"]
    assert all(len(event["sha256"]) == 64 for event in shards)
    unknown, left_out = [event["message"] for event in between if event["event"] == "remark"][-2:]
    assert unknown == "a name that no rule knows: vision_tower.proj.weight, kept in model/dense.safetensors"
    assert "'pytorch_model.bin' (weights in another form)" in left_out
    told = [event for event in between if event["event"] == "progress"]
    assert [event["bytes"] for event in told] == sorted(event["bytes"] for event in told)
    assert told[-1]["bytes"] == begin["total_bytes"] == end["moved_bytes"]
    assert all(event["layer"] for event in told)
    assert end["event"] == "end"
    assert kinds(result.out).count("end") == 1


def test_verify_and_restore_from_begin_to_end(
    program: Program, v3_resharded: Path, v3_folder: Path, tmp_path: Path
) -> None:
    shards = len(list(v3_folder.glob("model-*.safetensors")))
    for command, arguments, in_between in (
        ("verify", (v3_resharded,), {"progress"}),
        ("check", (v3_resharded, "--check"), {"progress"}),
        ("restore", (v3_resharded, tmp_path / "back"), {"progress", "shard"}),
    ):
        result = program("reshard", command.replace("check", "restore"), *arguments, "--json", "-q")
        found = events(result.out)
        assert (found[0]["event"], found[0]["command"], found[-1]["event"]) == ("begin", command, "end")
        assert {event["event"] for event in found[1:-1]} == in_between
        told = [event["bytes"] for event in found if event["event"] == "progress"]
        assert 0 < told[-1] <= found[0]["total_bytes"]
        if command != "verify":
            assert len(found[-1]["shards"]) == shards


def test_damage_is_told_in_the_end(program: Program, resharded_copy: Path) -> None:
    os.truncate(resharded_copy / "LICENSE", 1)
    result = program("reshard", "verify", resharded_copy, "--json")
    end = events(result.out)[-1]
    assert (result.code, end["event"], end["ok"], end["damage"][0]["path"]) == (13, "end", False, "LICENSE")


def test_a_failure_has_no_end(
    program: Program, v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Progress.event

    def fail(self: Progress, kind: str, /, **values: object) -> None:
        told(self, kind, **values)
        if kind == "shard":
            raise ToolkitError("the disk is gone")

    monkeypatch.setattr(Progress, "event", fail)
    result = program("reshard", "run", v3_folder, tmp_path / "out", "--json", "--jobs", 1)
    assert (result.code, result.err) == (1, "reshard: the disk is gone\n")
    assert "shard" in kinds(result.out)
    assert "end" not in kinds(result.out)


def test_people_get_no_events(program: Program, v2_folder: Path, tmp_path: Path) -> None:
    out = program("reshard", "run", v2_folder, tmp_path / "out").out
    assert (out.count("\n"), "{" in out) == (1, False)


def start(arguments: Sequence[object], **options: Any) -> subprocess.Popen[bytes]:
    # Where Python is told not to buffer, nothing is ever held back for a reader who is gone.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "reshard", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, **options)


def test_a_reader_that_goes_away_does_not_stop_the_work(
    v3_folder: Path, v3_resharded: Path, tmp_path: Path, tree: Tree
) -> None:
    process = start(["run", v3_folder, tmp_path / "out", "--json"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    # As with any command whose output was cut: it ends with 1, and there is nothing to say.
    assert (process.returncode, err) == (1, b"")
    assert tree(tmp_path / "out") == tree(v3_resharded)


def test_a_full_disk_for_the_events_does_not_stop_the_work(
    v3_folder: Path, v3_resharded: Path, tmp_path: Path, tree: Tree
) -> None:
    with open("/dev/full", "wb") as full:
        process = start(["run", v3_folder, tmp_path / "out", "--json"], stdout=full)
        _, err = process.communicate()
    assert (process.returncode, err) == (15, b"reshard: stdout: No space left on device\n")
    assert tree(tmp_path / "out") == tree(v3_resharded)


def test_a_failure_is_told_also_when_nobody_reads_along(v3_copy: Path, tmp_path: Path) -> None:
    """Python itself would end with 120 and a complaint about what it still holds for the reader."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("x")
    process = start(["run", v3_copy, tmp_path / "out", "--json"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.startswith(f"reshard: {tmp_path}/out: is not empty".encode())
    assert err.count(b"\n") == 1


def test_every_line_is_written_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    stream = EventStream(enabled=True)
    stream.write({"event": "shard", "name": "\udcff\u2028\n"})
    assert raw.getvalue() == b'{"event": "shard", "name": "\\udcff\\u2028\\n"}\n'
    stream.end({"path": "x"})
    assert raw.getvalue().splitlines()[1] == b'{"event": "end", "path": "x"}'


def test_what_is_no_json_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        EventStream(enabled=True).write({"event": "progress", "bytes_per_s": float("inf")})


def test_a_bar_and_events_do_not_share_a_terminal(v2_folder: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 400))
    command = [sys.executable, "-m", "reshard", "run", str(v2_folder), str(tmp_path / "out"), "--json"]
    process = subprocess.Popen(command, stdout=slave, stderr=slave)
    os.close(slave)
    drawn: list[bytes] = []

    def read() -> None:
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # how Linux says that the other side is closed
                return
            drawn.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait() == 0
    reader.join()
    os.close(master)
    text = b"".join(drawn).replace(b"\r\n", b"\n").decode()
    assert kinds(text)[0] == "begin"
    assert kinds(text)[-1] == "end"
