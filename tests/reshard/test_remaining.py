"""What is there and what is left, as `plan` and `doctor` tell it: the run itself is asked whether that is right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from manifests.console import format_seconds
from manifests.errors import ToolkitError
from manifests.paths import JOURNAL_NAME, MANIFEST_NAME
from manifests.schema import Selection
from reshard import disk, remaining, transfer
from reshard.blocks import TEMP_SUFFIX
from reshard.doctor import examine
from reshard.earlier import find_earlier
from reshard.forecast import missing_inodes
from reshard.journal import Journal
from reshard.lock import lock_folder
from reshard.packing import pack
from reshard.progress import Progress
from reshard.remaining import find_remaining

Program = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]
Stop = Callable[[int], AbstractContextManager[None]]
Reshard = Callable[..., Path]


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SYNC_BLOCKS", 1)
    monkeypatch.setattr(disk, "SAMPLE_BYTES", disk.BLOCK_BYTES)
    monkeypatch.setattr(disk, "HASH_SECONDS", 0.001)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def _sizes_for_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not synced has no blocks yet, and gets them while a test looks at it."""
    monkeypatch.setattr("reshard.run.used_bytes", lambda folder, _: size_of(folder))


def limit(patch: pytest.MonkeyPatch, folder: Path, room: int) -> None:
    """Let a disk have so much room, and as much more as is removed from a folder."""
    real, before = os.statvfs, size_of(folder)

    def statvfs(path: Any) -> Any:
        status = list(real(path))
        status[1], status[4] = 1, room + before - size_of(folder)
        return os.statvfs_result(status)

    patch.setattr(os, "statvfs", statvfs)


@pytest.fixture(params=["interrupted", "part", "widened", "finished"])
def begun(
    request: pytest.FixtureRequest, v3_copy: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop
) -> Path:
    """What v3_copy was begun to be resharded into, in one of four ways."""
    out = tmp_path / "out"
    if request.param == "interrupted":
        with stop_after(20):
            reshard_folder(v3_copy, out, jobs=1)
        assert list(out.rglob("*" + TEMP_SUFFIX))
        return out
    reshard_folder(v3_copy, out, Selection(layers=(1,)))
    if request.param == "widened":
        with stop_after(20):
            reshard_folder(v3_copy, out, jobs=1)
    if request.param == "finished":
        # Stopped between the last two steps: a manifest, and the journal of the run that wrote it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("reshard.run.end_journal", lambda _: None)
            reshard_folder(v3_copy, out, Selection(layers=(1, 2)))
        assert (out / JOURNAL_NAME).exists()
    return out


def test_what_is_left_is_what_the_run_then_does(
    begun: Path, v3_copy: Path, program: Program, monkeypatch: pytest.MonkeyPatch, stamps: Any, tree: Tree
) -> None:
    before, inodes = tree(begun), stamps(begun)
    with lock_folder(begun):  # a run that is under way keeps nobody from looking
        document = program("reshard", "plan", v3_copy, begun, "--json").json
        text = program("reshard", "plan", v3_copy, begun).out
    assert stamps(begun) == inodes
    read: list[int] = []
    written = set()
    real = transfer.pump

    def pump(pieces: Any, **options: Any) -> Any:
        read.append(sum(piece.size for piece in pieces))
        written.update(piece.target.open.__self__.path for piece in pieces if piece.target)
        return real(pieces, **options)

    monkeypatch.setattr(transfer, "pump", pump)
    result = program("reshard", "run", v3_copy, begun, "--json")
    end = json.loads(result.out.splitlines()[-1])
    assert (document["kept_bytes"], document["write_bytes"]) == (end["kept_bytes"], end["moved_bytes"])
    assert document["kept_bytes"] + document["write_bytes"] == document["payload_bytes"]
    assert document["read_bytes"] == sum(read)
    assert document["write_files"] == len(written)
    made = {JOURNAL_NAME, *tree(begun)} - {path.removesuffix(TEMP_SUFFIX) for path in before}
    assert document["needed_inodes"] == len(made)
    files = f"{document['files'] - document['write_files']} of {document['files']} files, of "
    assert files in text
    assert f", {document['write_files']} files\n" in text.split("to write   ")[1]


@pytest.mark.parametrize("consume", [False, True])
def test_the_room_is_what_the_run_asks_for(
    consume: bool, begun: Path, v3_copy: Path, tmp_path: Path, program: Program
) -> None:
    options = ["--consume"] if consume else []
    needed = program("reshard", "plan", v3_copy, begun, "--json", *options).json["needed_bytes"]
    whole = program("reshard", "plan", v3_copy, tmp_path / "new", "--json", *options).json["needed_bytes"]
    # Beside a part that was there before, consuming needs as much as without it.
    assert 0 < needed <= whole
    assert consume or needed < whole
    short = shutil.copytree(begun, tmp_path / "short")
    run = ["run", *options, *(["--yes"] if consume else [])]
    for folder, room, code in ((short, needed - 1, 15), (begun, needed, 0)):
        with pytest.MonkeyPatch.context() as patch:
            limit(patch, folder, room)
            for command in (["plan", *options], run):
                result = program("reshard", *command, v3_copy, folder)
                assert result.code == code, (command, result.err)
        assert (folder / MANIFEST_NAME).exists() or code


def test_room_where_a_source_was_used_up_in_part(
    v3_copy: Path, tmp_path: Path, program: Program, reshard_folder: Reshard, stop_after: Stop
) -> None:
    with stop_after(20):
        reshard_folder(v3_copy, tmp_path / "out", jobs=1, consume=True)
    out = tmp_path / "out"
    document = program("reshard", "plan", v3_copy, out, "--consume", "--json").json
    assert (document["state"], document["needed_bytes"]) == ("interrupted", document["consume_needed_bytes"])
    assert 0 < document["needed_bytes"] <= document["consume_peak_bytes"]
    facts = examine(v3_copy, out).facts
    assert (facts.needed_bytes, facts.consume_peak_bytes) == (
        document["needed_bytes"], document["consume_peak_bytes"],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, out, document["needed_bytes"])
        assert program("reshard", "plan", v3_copy, out, "--consume").code == 0
    assert program("reshard", "run", v3_copy, out, "--consume", "--yes", "-q").code == 0
    # Used up and complete.
    assert program("reshard", "plan", v3_copy, out, "--json").json["state"] == "complete"


def test_nothing_is_left(
    v3_resharded: Path, v3_folder: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, v3_resharded, 0)
    for selection in ([], ["--layers", "1"]):
        document = program("reshard", "plan", v3_folder, v3_resharded, "--json", *selection).json
        assert (document["state"], document["kept_bytes"]) == ("complete", document["payload_bytes"])
        for key in ("write_bytes", "write_files", "read_bytes", "needed_bytes", "needed_inodes", "seconds"):
            assert document[key] == 0, key
    result = program("reshard", "plan", v3_folder, v3_resharded)
    assert (result.code, result.err) == (0, "")
    assert "\nthere      all of it; nothing is left to do\n" in result.out
    assert "needed" not in result.out
    facts = examine(v3_folder, v3_resharded).facts
    assert (facts.state, facts.needed_bytes, facts.needed_inodes, facts.seconds) == ("complete", 0, 0, 0)


def test_a_part_that_was_asked_for_again_is_complete(
    v3_folder: Path, tmp_path: Path, program: Program, reshard_folder: Reshard
) -> None:
    out = reshard_folder(v3_folder, tmp_path / "out", Selection(layers=(1, 2)))
    states = [
        program("reshard", "plan", v3_folder, out, "--layers", layers, "--json").json["state"]
        for layers in ("1", "1-2", "1-3")
    ]
    assert states == ["complete", "complete", "part"]


def test_plan_and_doctor_say_the_same(begun: Path, v3_copy: Path, tmp_path: Path, program: Program) -> None:
    for folder in (begun, tmp_path / "new"):
        document = program("reshard", "plan", v3_copy, folder, "--json").json
        facts = examine(v3_copy, folder).facts
        for key in ("state", "kept_bytes", "write_bytes", "write_files", "needed_bytes", "needed_inodes"):
            assert getattr(facts, key) == document[key], key
        assert examine(v3_copy, folder).exit_code == 0


def test_the_time_is_that_of_the_rest(
    begun: Path, v3_copy: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cli_plan", "doctor"):
        monkeypatch.setattr(f"reshard.{module}.measure_read_rate", lambda _: 1.0)
        monkeypatch.setattr(f"reshard.{module}.measure_hash_rate", lambda: 1e9)
    monkeypatch.setattr("reshard.doctor.measure_write_rate", lambda *_, **__: 1.0)
    monkeypatch.setattr("reshard.doctor.measure_fsync_seconds", lambda _: 1e6)
    document = program("reshard", "plan", v3_copy, begun, "--json").json
    assert document["seconds"] == document["read_bytes"] + document["write_bytes"]
    assert document["seconds"] < 2 * document["payload_bytes"]
    report = examine(v3_copy, begun)
    assert report.facts.seconds == document["seconds"]
    fsyncs = f"{document['write_files']} files takes {format_seconds(1e6 * document['write_files'])},"
    assert f"; to fsync {fsyncs}" in report.checks[-1].message


def test_a_run_that_went_on_with_consume_goes_on_so(
    v3_copy: Path, tmp_path: Path, program: Program, reshard_folder: Reshard, stop_after: Stop
) -> None:
    """It did not begin so: what says it is a later record."""
    out = tmp_path / "out"
    for consume in (False, True):
        with stop_after(10):
            reshard_folder(v3_copy, out, jobs=1, consume=consume)
    needed = program("reshard", "plan", v3_copy, out, "--consume", "--json").json["needed_bytes"]
    assert needed < program("reshard", "plan", v3_copy, out, "--json").json["needed_bytes"]
    assert examine(v3_copy, out).facts.needed_bytes == needed


def test_a_dry_run_says_it_too(begun: Path, v3_copy: Path, program: Program) -> None:
    others = {"free_bytes": 0, "free_inodes": 0}  # who use the disk too
    dry = program("reshard", "run", v3_copy, begun, "--dry-run", "--json").json
    assert dry | others == program("reshard", "plan", v3_copy, begun, "--json").json | others


def test_a_file_that_is_gone_is_left_to_write(begun: Path, v3_copy: Path, plan_of: Any, program: Program) -> None:
    before = program("reshard", "plan", v3_copy, begun, "--json").json
    file = sorted(begun.rglob("*.safetensors"))[-1]
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    document = program("reshard", "plan", v3_copy, begun, "--json").json
    assert document["write_files"] == before["write_files"] + 1
    assert size - 4096 - 2 <= document["write_bytes"] - before["write_bytes"] <= size
    file.unlink()
    assert program("reshard", "plan", v3_copy, begun, "--json").json["write_bytes"] == document["write_bytes"]
    assert (
        json.loads(program("reshard", "run", v3_copy, begun, "--json").out.splitlines()[-1])["moved_bytes"]
        == (document["write_bytes"])
    )


def damage(kind: str, source: Path, out: Path, *, reshard_folder: Reshard, stop_after: Stop) -> list[str]:
    """Make a destination that a run refuses; return the options to give."""
    match kind:
        case "a folder of somebody's":
            out.mkdir()
            (out / "letters.txt").write_text("x")
        case "another checkpoint":
            reshard_folder(source.with_name("v2"), out)
        case "another model of the same form":
            reshard_folder(source, out, Selection(layers=(1,)))
            for shard in source.glob("model-*.safetensors"):
                raw = bytearray(shard.read_bytes())
                raw[-1] ^= 1
                shard.write_bytes(raw)
        case "a small file that was changed":
            reshard_folder(source, out, Selection(layers=(1,)))
            (source / "LICENSE").write_text("another")
        case "packed":
            reshard_folder(source, out, Selection(layers=(1,)))
            with Progress(0, label="", quiet=True) as progress:
                pack(out, jobs=1, progress=progress)
        case "no layers times experts":
            reshard_folder(source, out, Selection(layers=(1,)))
            return ["--layers", "2", "--experts", "1"]
        case "a damaged manifest":
            out.mkdir()
            (out / MANIFEST_NAME).write_text("{}")
        case "a damaged journal":
            out.mkdir()
            (out / JOURNAL_NAME).write_text('{"check":""}\n')
        case "another command's journal":
            out.mkdir()
            Journal.create(out, {"task": "restore"}).close()
        case "a run with another selection":
            with stop_after(2):
                reshard_folder(source, out, Selection(layers=(1,)), jobs=1)
        case "a run from another source":
            with stop_after(2):
                reshard_folder(source, out, jobs=1)
            os.utime(next(source.glob("model-00009-*")))
        case "a widening, and a small file that was changed":
            reshard_folder(source, out, Selection(layers=(1,)))
            with stop_after(2):
                reshard_folder(source, out, jobs=1)
            (source / "LICENSE").write_text("another")
        case "what a freed shard gave is gone":
            with stop_after(20):
                reshard_folder(source, out, jobs=1, consume=True)
            sorted((out / "layers").rglob("*.safetensors"))[0].unlink()
        case _:
            raise AssertionError(kind)
    return []


@pytest.mark.parametrize(
    "kind",
    [
        "a folder of somebody's", "another checkpoint", "another model of the same form",
        "a small file that was changed", "packed", "no layers times experts", "a damaged manifest",
        "a damaged journal", "another command's journal", "a run with another selection",
        "a run from another source", "a widening, and a small file that was changed",
        "what a freed shard gave is gone",
    ],
)  # fmt: skip
def test_what_the_run_refuses_is_refused_with_its_words(
    kind: str, v3_copy: Path, v2_copy: Path, tmp_path: Path, program: Program, reshard_folder: Reshard,
    stop_after: Stop, tree: Tree,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    options = damage(kind, v3_copy, out, reshard_folder=reshard_folder, stop_after=stop_after)
    before = tree(tmp_path)
    planned = program("reshard", "plan", v3_copy, out, *options)
    assert tree(tmp_path) == before
    report = examine(v3_copy, out)
    run = program("reshard", "run", v3_copy, out, *options)
    assert (planned.code, planned.out, planned.err) == (run.code, "", run.err)
    assert planned.code
    if not options:
        assert run.err.strip().removeprefix("reshard: ") in [check.message for check in report.checks]


def test_little_is_read_to_know_the_source(
    v3_copy: Path, tmp_path: Path, plan_of: Any, reshard_folder: Reshard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the limit every byte counts, and what is beyond it is the run's to compare."""
    out = reshard_folder(v3_copy, tmp_path / "out", Selection(layers=(1,)))
    source, plan = plan_of(v3_copy)
    earlier = find_earlier(v3_copy, out)
    held = {
        tensor.name: tensor for file in plan.files for tensor in file.tensors if tensor.name in earlier.durable.tensors
    }
    smallest, *_, largest = sorted((tensor for tensor in held.values() if tensor.size), key=lambda tensor: tensor.size)
    empty = sum(not tensor.size for tensor in held.values())
    monkeypatch.setattr(remaining, "SAMPLE_TENSORS", empty + 1)
    for tensor, is_seen in ((largest, False), (smallest, True)):
        raw = bytearray((v3_copy / tensor.shard).read_bytes())
        raw[tensor.source_offset] ^= 1
        (v3_copy / tensor.shard).write_bytes(raw)
        if is_seen:
            with pytest.raises(ToolkitError, match="holds another model"):
                find_remaining(source, plan, earlier, out)
        else:
            assert find_remaining(source, plan, earlier, out).state == "part"
    assert len(earlier.durable.tensors) > 1  # what was found is not changed


def test_consuming_is_offered_where_room_is_short(
    v3_copy: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ("reshard", "plan", v3_copy)
    out = tmp_path / "out"
    enough = program(*plan, out, "--json").json
    assert enough["consume_needed_bytes"] is None
    peak = program(*plan, out, "--consume", "--json").json["consume_needed_bytes"]
    assert "--consume" not in program(*plan, out).out
    limit(monkeypatch, tmp_path, enough["needed_bytes"] - 1)
    result = program(*plan, out)
    assert result.code == 15
    assert result.out.count("--consume needs only ") == 1
    assert program(*plan, out, "--json").json["consume_needed_bytes"] == peak < enough["needed_bytes"]
    # Asked for, it is told as what is needed; for a part it is refused.
    assert "needs only" not in program(*plan, out, "--consume").out
    assert "--consume" not in program(*plan, out, "--layers", "1-3").out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reshard.run.same_disk", lambda *_: False)
        assert "--consume" not in program(*plan, out).out
    os.link(next(v3_copy.glob("model-00003*")), tmp_path / "second name")
    assert "--consume" not in program(*plan, out).out


def test_too_few_inodes_are_refused_as_by_the_run(
    v3_folder: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = program("reshard", "plan", v3_folder, tmp_path / "out", "--json").json["needed_inodes"]
    monkeypatch.setattr("reshard.destination.free_inodes", lambda _: needed - 1)
    planned = program("reshard", "plan", v3_folder, tmp_path / "out")
    run = program("reshard", "run", v3_folder, tmp_path / "out")
    assert (planned.code, planned.err) == (run.code, run.err) == (15, run.err)


def test_inodes_of_an_empty_folder_and_of_a_whole_one(
    v3_folder: Path, v3_resharded: Path, tmp_path: Path, plan_of: Any, tree: Tree
) -> None:
    source, plan = plan_of(v3_folder)
    assert missing_inodes(source, plan, tmp_path) == len(tree(v3_resharded)) + 1
    assert missing_inodes(source, plan, v3_resharded) == 1  # the journal, which is gone at the end
