"""What the doctor finds, with which exit code, and that it leaves everything as it was."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import ToolkitError
from manifests.schema import Selection
from reshard import disk, doctor
from reshard.doctor import Report, examine
from reshard.filesystem import Abilities
from reshard.lock import lock_folder
from reshard.plan import Plan
from reshard.progress import Progress
from reshard.run import needed_bytes, reshard_checkpoint
from reshard.source import SourceCheckpoint

Tree = Callable[[Path], dict[str, str]]
Stamps = Callable[[Path], dict[str, tuple[int, int, int]]]
FailCall = Callable[..., list[int]]
Program = Callable[..., Any]

TOPICS = [
    "source", "destination", "file system", "durability", "O_DIRECT", "holes", "punching", "locking", "names",
    "writing", "consume", "space", "inodes", "open files", "reading",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SYNC_BLOCKS", 1)
    monkeypatch.setattr(disk, "SAMPLE_BYTES", disk.BLOCK_BYTES)
    monkeypatch.setattr(disk, "HASH_SECONDS", 0.001)


def problems(report: Report) -> list[tuple[str, int]]:
    return [(check.topic, check.exit_code) for check in report.checks if check.state == "problem"]


def message(report: Report, topic: str) -> tuple[str, str]:
    (found,) = [check for check in report.checks if check.topic == topic]
    return found.state, found.message


def test_a_run_can_start(v3_folder: Path, tmp_path: Path, tree: Tree, stamps: Stamps) -> None:
    before = stamps(v3_folder)
    report = examine(v3_folder, tmp_path / "deep" / "out")
    assert (report.exit_code, problems(report)) == (0, [])
    assert [check.topic for check in report.checks] == TOPICS
    assert stamps(v3_folder) == before
    assert tree(tmp_path) == {}
    facts = report.facts
    assert (facts.shards, facts.files, facts.same_file_system) == (len(list(v3_folder.glob("model-*"))), 42, True)
    assert facts.write_bytes_per_s is not None
    assert facts.read_bytes_per_s is None  # too small
    assert message(report, "destination") == ("ok", f"{tmp_path}/deep/out: new")


def test_an_empty_destination(v3_folder: Path, tmp_path: Path, tree: Tree) -> None:
    report = examine(v3_folder, tmp_path)
    assert message(report, "destination") == ("ok", f"{tmp_path}: empty")
    assert (report.exit_code, tree(tmp_path)) == (0, {})


def test_the_document_has_the_promised_keys(v3_folder: Path, tmp_path: Path) -> None:
    document = json.loads(json.dumps(examine(v3_folder, tmp_path / "out").to_document()))
    assert list(document) == ["can_start", "exit_code", "source", "destination", "facts", "checks"]
    assert list(document["facts"]) == [
        "shards", "tensors", "payload_bytes", "files", "state", "kept_bytes", "write_bytes", "write_files",
        "file_system", "same_file_system", "needed_bytes", "free_bytes", "consume_peak_bytes", "consume_needed_bytes",
        "needed_inodes", "free_inodes", "abilities", "read_bytes_per_s", "write_bytes_per_s", "fsync_seconds",
        "sha256_bytes_per_s", "cores", "seconds", "limited_by",
    ]  # fmt: skip
    assert list(document["checks"][0]) == ["topic", "state", "message", "exit_code"]
    assert set(document["facts"]["abilities"]) == {
        "direct_write", "direct_read", "punch_hole", "sparse", "lock", "tells_case",
    }  # fmt: skip


def test_lines_for_people(v3_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    lines = list(examine(v3_folder, tmp_path).lines())
    assert lines[0].startswith("ok       source       ")
    assert lines[1].startswith(f"PROBLEM  destination  {tmp_path}: is not empty")
    assert lines[-1] == "can start: no"
    (tmp_path / "other").unlink()
    assert list(examine(v3_folder, tmp_path).lines())[-1] == "can start: yes"


def test_the_time_follows_from_what_was_measured(
    v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "measure_read_rate", lambda _: 2e6)
    monkeypatch.setattr(doctor, "measure_write_rate", lambda *_, **__: 1e6)
    monkeypatch.setattr(doctor, "measure_fsync_seconds", lambda _: 0.0)
    monkeypatch.setattr(doctor, "measure_hash_rate", lambda: 1e9)
    report = examine(v3_folder, tmp_path / "out")
    size = report.facts.payload_bytes
    assert size is not None
    assert (report.facts.seconds, report.facts.limited_by) == (pytest.approx(size / 2e6 + size / 1e6), "the disk")
    state, text = message(report, "time")
    assert (state, text.endswith(", limited by the disk, which is read and written")) == ("ok", True)
    monkeypatch.setattr(doctor, "measure_fsync_seconds", lambda _: 1.0)
    assert "to fsync 42 files takes 42.0 s" in message(examine(v3_folder, tmp_path / "out"), "time")[1]
    monkeypatch.setattr(doctor, "same_disk", lambda *_: False)
    report = examine(v3_folder, tmp_path / "out")
    assert (report.facts.seconds, report.facts.limited_by) == (pytest.approx(size / 1e6), "writing")
    assert report.facts.consume_peak_bytes is None
    assert message(report, "consume") == (
        "note", "--consume would gain nothing: the source is on another file system",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda folder: folder.rename(folder.with_name("gone")), 10),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), 12),
        (lambda folder: next(folder.glob("model-0*")).unlink(), 10),
        (lambda folder: (folder / "manifest.json").write_text("{}"), 12),
    ],
)
def test_a_source_that_is_none(damage: Callable[[Path], Any], code: int, v3_copy: Path, tmp_path: Path) -> None:
    damage(v3_copy)
    report = examine(v3_copy, tmp_path / "out")
    assert problems(report) == [("source", code)]
    assert report.exit_code == code
    # What needs no source is looked at all the same.
    assert "writing" in [check.topic for check in report.checks]


def test_a_destination_that_a_run_would_refuse(v3_copy: Path, tmp_path: Path, tree: Tree, plan_of: Any) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters.txt").write_text("x")
    before = tree(tmp_path)
    for name in ("v3", "v3/inside", ".", "file", "full"):
        report = examine(v3_copy, tmp_path / name)
        assert problems(report) == [("destination", 1)], name
        # Nothing is tried in a place that is not for us.
        assert "durability" not in [check.topic for check in report.checks], name
        # What lies there takes nothing off.
        assert (report.facts.state, report.facts.needed_bytes) == (None, needed_bytes(*plan_of(v3_copy))), name
    assert tree(tmp_path) == before
    with lock_folder(tmp_path / "full"):
        assert problems(examine(v3_copy, tmp_path / "full")) == [("destination", 11)]


def test_a_file_in_the_way(v3_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert problems(examine(v3_folder, tmp_path / "file" / "out")) == [("writing", 1)]


def test_too_little_space(v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan_of: Any) -> None:
    needed = needed_bytes(*plan_of(v3_folder))
    monkeypatch.setattr(doctor, "free_bytes", lambda _: needed)
    report = examine(v3_folder, tmp_path / "out")
    assert (report.exit_code, report.facts.needed_bytes, report.facts.free_bytes) == (0, needed, needed)
    assert message(report, "writing")[0] == "note"  # no room to measure in
    assert report.facts.write_bytes_per_s is None
    peak = report.facts.consume_peak_bytes
    assert peak is not None
    assert peak < needed
    monkeypatch.setattr(doctor, "free_bytes", lambda _: needed - 1)
    report = examine(v3_folder, tmp_path / "out")
    assert problems(report) == [("space", 15)]
    assert "; --consume, which frees the source as it goes, needs " in message(report, "space")[1]
    monkeypatch.setattr(doctor, "free_bytes", lambda _: peak - 1)
    assert message(examine(v3_folder, tmp_path / "out"), "space")[1].endswith("; free some, or choose another disk")


def test_too_few_inodes(v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = examine(v3_folder, tmp_path / "out").facts.needed_inodes
    assert needed is not None
    for free, expected in ((needed, []), (needed - 1, [("inodes", 15)]), (None, [])):
        monkeypatch.setattr(doctor, "free_inodes", lambda _, free=free: free)
        assert problems(examine(v3_folder, tmp_path / "out")) == expected
    assert "no limit to them" in message(examine(v3_folder, tmp_path / "out"), "inodes")[1]


def test_what_a_run_can_do_without_is_a_note(v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Abilities(**dict.fromkeys(Abilities.__slots__, False))
    monkeypatch.setattr(doctor, "try_abilities", lambda _: nothing)
    report = examine(v3_folder, tmp_path / "out")
    assert report.exit_code == 0
    for topic in ("O_DIRECT", "holes", "punching", "locking", "names"):
        assert message(report, topic)[0] == "note"


@pytest.mark.parametrize(("kind", "state"), [("ext4", "ok"), ("nfs4", "note"), ("tmpfs", "note"), (None, "ok")])
def test_the_file_system(
    kind: str | None, state: str, v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "type_of", lambda _: kind)
    report = examine(v3_folder, tmp_path / "out")
    assert message(report, "file system")[0] == state
    assert message(report, "file system")[1].startswith(f"{kind or 'of unknown type'}, the source's too")


def test_few_open_files(v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    report = examine(v3_folder, tmp_path / "out")
    assert (report.exit_code, message(report, "open files")[0]) == (0, "note")


@pytest.mark.parametrize(
    ("call", "code", "topic", "exit_code"),
    [
        ("fsync", errno.EIO, "writing", 1), ("rename", errno.EIO, "writing", 1),
        ("pwrite", errno.ENOSPC, "writing", 15), ("mkdir", errno.EROFS, "writing", 1),
    ],
)  # fmt: skip
def test_a_disk_that_fails(
    call: str, code: int, topic: str, exit_code: int, v3_folder: Path, tmp_path: Path, fail_call: FailCall, tree: Tree
) -> None:
    fail_call(call, 1, code)
    report = examine(v3_folder, tmp_path)
    assert problems(report) == [(topic, exit_code)]
    assert report.exit_code == exit_code
    assert tree(tmp_path) == {}


def test_what_the_system_refuses_is_told_and_the_others_go_on(
    v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", "/the/place")

    monkeypatch.setattr(doctor, "type_of", refuse)
    report = examine(v3_folder, tmp_path / "out")
    assert problems(report) == [("file system", 1)]
    assert message(report, "file system")[1] == "/the/place: Permission denied"
    assert report.checks[-1].topic == "reading"


def test_measuring_leaves_most_of_what_is_free(
    v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, is_measured in ((4 * disk.BLOCK_BYTES - 1, False), (4 * disk.BLOCK_BYTES, True)):
        monkeypatch.setattr(doctor, "free_bytes", lambda _, free=free: free)
        assert (examine(v3_folder, tmp_path / "out").facts.write_bytes_per_s is not None) is is_measured


def test_a_source_that_cannot_be_read(v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> float:
        raise ToolkitError("shard: cannot be read at byte 0: Input/output error")

    monkeypatch.setattr(doctor, "measure_read_rate", fail)
    assert problems(examine(v3_folder, tmp_path / "out")) == [("reading", 1)]


def test_links_are_told_before_consume_refuses_them(v3_copy: Path, tmp_path: Path) -> None:
    shard = next(v3_copy.glob("model-00003*"))
    os.link(shard, tmp_path / "second name")
    report = examine(v3_copy, tmp_path / "out")
    assert report.exit_code == 0
    state, text = message(report, "consume")
    assert (state, text.startswith("--consume is not possible: ")) == ("note", True)
    assert "hard links" in text
    assert report.facts.consume_peak_bytes is None
    blob = tmp_path / "models--a--b" / "blobs" / "x"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    blob.parent.mkdir(parents=True)
    snapshot.parent.mkdir()
    (tmp_path / "second name").unlink()
    v3_copy.rename(snapshot)
    shard = snapshot / shard.name
    shard.rename(blob)
    shard.symlink_to("../../blobs/x")
    assert "hub's cache" in message(examine(snapshot, tmp_path / "out"), "consume")[1]


def test_a_source_that_cannot_be_changed(v3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no file can be removed from it" in message(examine(v3_folder, tmp_path / "out"), "consume")[1]


def interrupt_run(source: SourceCheckpoint, plan: Plan, destination: Path, *, consume: bool = False) -> Path:
    """Leave a destination with the journal of a run that was stopped after its first shard."""
    told = Progress.event

    def stop(self: Progress, kind: str, /, **values: object) -> None:
        told(self, kind, **values)
        if kind == "shard":
            raise ToolkitError("stopped")

    with pytest.MonkeyPatch.context() as patch, Progress(0, label="", quiet=True) as progress:
        patch.setattr(Progress, "event", stop)
        with pytest.raises(ToolkitError, match="stopped"):
            reshard_checkpoint(source, plan, destination, jobs=1, progress=progress, consume=consume)
    assert (destination / "reshard-journal.jsonl").exists()
    return destination


@pytest.fixture
def interrupted(v3_folder: Path, tmp_path: Path, plan_of: Any) -> Path:
    return interrupt_run(*plan_of(v3_folder), tmp_path / "half")


def test_an_interrupted_run_that_consumes_goes_on_so(
    v3_copy: Path, tmp_path: Path, plan_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = interrupt_run(*plan_of(v3_copy), tmp_path / "half", consume=True)
    report = examine(v3_copy, half)
    assert report.exit_code == 0
    facts = report.facts
    peak, needed = facts.consume_peak_bytes, facts.needed_bytes
    assert peak is not None
    assert needed is not None
    # What the run that was stopped wrote, of a shard that is not freed yet, is a part of the peak.
    assert (needed, needed < peak) == (facts.consume_needed_bytes, True)
    monkeypatch.setattr(doctor, "free_bytes", lambda _: needed)
    assert examine(v3_copy, half).exit_code == 0
    monkeypatch.setattr(doctor, "free_bytes", lambda _: needed - 1)
    report = examine(v3_copy, half)
    assert problems(report) == [("space", 15)]
    assert message(report, "space")[1].endswith("; free some, or choose another disk")
    # What the run would refuse is a problem here, and no remark.
    os.link(next(v3_copy.glob("model-*.safetensors")), tmp_path / "second name")
    assert problems(examine(v3_copy, half))[0] == ("consume", 1)


def test_an_interrupted_run_goes_on(
    interrupted: Path, v3_folder: Path, v3_copy: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(interrupted)
    whole = examine(v3_folder, interrupted.with_name("new")).facts
    report = examine(v3_folder, interrupted)
    assert tree(interrupted) == before
    state, text = message(report, "destination")
    assert (report.exit_code, state) == (0, "note")
    assert "an interrupted run, " in text
    assert whole.needed_bytes is not None
    assert report.facts.needed_bytes is not None
    assert report.facts.needed_bytes < whole.needed_bytes
    assert whole.needed_inodes is not None
    assert report.facts.needed_inodes is not None
    assert report.facts.needed_inodes < whole.needed_inodes
    monkeypatch.setattr(doctor, "measure_read_rate", lambda _: 1.0)
    monkeypatch.setattr(doctor, "measure_write_rate", lambda *_, **__: 1.0)
    report = examine(v3_folder, interrupted)
    assert whole.payload_bytes is not None
    assert report.facts.seconds is not None
    assert report.facts.kept_bytes
    assert report.facts.seconds == 2 * (whole.payload_bytes - report.facts.kept_bytes)
    # Another source is not that run's.
    os.utime(next(v3_copy.glob("model-00002-*")))
    assert problems(examine(v3_copy, interrupted)) == [("destination", 12)]


def test_what_is_there_already(v3_resharded: Path, v3_folder: Path, tmp_path: Path, reshard_folder: Any) -> None:
    part = reshard_folder(v3_folder, tmp_path / "part", Selection(layers=(1,)))
    report = examine(v3_folder, part)
    state, text = message(report, "destination")
    assert (report.exit_code, state, text.endswith("; a run adds the rest")) == (0, "note", True)
    whole = reshard_folder(v3_folder, tmp_path / "whole")
    report = examine(v3_folder, whole)
    assert (report.exit_code, message(report, "destination")[1]) == (
        0, f"{whole}: complete already, nothing is left to do",
    )  # fmt: skip


def test_another_checkpoint_is_there(v3_resharded: Path, v2_folder: Path, tmp_path: Path, resharded_copy: Path) -> None:
    report = examine(v2_folder, resharded_copy)
    assert [topic for topic, _ in problems(report)] == ["destination"]
    (resharded_copy / "manifest.json").write_text("{}")
    assert problems(examine(v2_folder, resharded_copy))[0] == ("destination", 12)


def test_ctrl_c(v3_folder: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    def interrupt(folder: Path) -> float:
        assert [path.name.startswith(".reshard-doctor-") for path in tmp_path.iterdir()] == [True]
        assert any(folder.iterdir())
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(doctor, "measure_fsync_seconds", interrupt)
    result = program("reshard", "doctor", v3_folder, tmp_path / "out")
    assert (result.code, result.out, result.err.strip()) == (130, "", "reshard: interrupted")
    assert tree(tmp_path) == {}


def test_the_command(v3_folder: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    result = program("reshard", "doctor", v3_folder, tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("\ncan start: yes\n")
    assert program("reshard", "doctor", v3_folder, tmp_path / "out", "--json").json["can_start"] is True
    monkeypatch.setattr(doctor, "free_bytes", lambda _: 0)
    result = program("reshard", "doctor", v3_folder, tmp_path / "out", "--json")
    assert (result.code, result.json["exit_code"], result.err) == (15, 15, "")
    result = program("reshard", "doctor", tmp_path / "\x07bell", tmp_path / "out")
    assert (result.code, "\x07" in result.out, "\\x07bell" in result.out) == (10, False, True)


def test_the_exit_code_is_the_one_that_the_run_ends_with(v3_copy: Path, tmp_path: Path, program: Program) -> None:
    """Not told twice: the run itself is asked."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for source, destination in (
        (tmp_path / "absent", tmp_path / "out"), (v3_copy, tmp_path / "full"), (v3_copy, v3_copy),
        (v3_copy, tmp_path / "full" / "x" / "out"), (tmp_path / "full", tmp_path / "out"),
    ):  # fmt: skip
        expected = program("reshard", "run", source, destination).code
        assert expected
        assert examine(source, destination).exit_code == expected
