"""The resharder's commands: what they print, what `--json` promises, how they end."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import reshard.cli as cli
from reshard.cli_options import NumberList
from reshard.disk import BLOCK_BYTES

Program = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]


def last(result: Any) -> Any:
    """The result that a command which tells its events ends with."""
    return json.loads(result.out.splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", (3,)), ("0,5-9", (0, 5, 6, 7, 8, 9)), ("9,1,1,9", (1, 9)), ("3-3", (3,)), (" 1 , 2-3 ", (1, 2, 3)),
        ("007", (7,)), ("5-6,6-7", (5, 6, 7)),
    ],
)  # fmt: skip
def test_lists_of_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert NumberList().convert(text, None, None) == numbers


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "-1", "1-", "5-3", "a", "1;2", "1 2", "1.5", "99999", "\u0663", "1-2-3", "0x1"]
)
def test_what_is_no_list_of_numbers(text: str) -> None:
    with pytest.raises(click.BadParameter, match="not a list of numbers"):
        NumberList().convert(text, None, None)


PLAN_KEYS = {
    "source", "shards", "tensors", "left_out_tensors", "payload_bytes", "files", "expert_files", "needed_bytes",
    "consume_peak_bytes", "free_bytes", "needed_inodes", "free_inodes", "read_bytes_per_s", "seconds", "limited_by",
    "auxiliary", "left_out", "unknown_tensors", "state", "kept_bytes", "write_bytes", "write_files", "read_bytes",
    "consume_needed_bytes", "generated",
}  # fmt: skip


def test_plan(program: Program, v3_folder: Path, tmp_path: Path, tree: Tree, v3_bytes: dict[str, bytes]) -> None:
    result = program("reshard", "plan", v3_folder, tmp_path / "out", "--json")
    assert (result.code, result.err) == (0, "")
    plan = result.json
    assert plan.keys() == PLAN_KEYS
    assert (plan["tensors"], plan["payload_bytes"]) == (len(v3_bytes), sum(map(len, v3_bytes.values())))
    assert (plan["files"], plan["expert_files"], plan["left_out_tensors"]) == (33 + 4 + 3 + 2, 33, 0)
    assert plan["seconds"] is plan["limited_by"] is None  # too small to measure a disk with
    assert plan["unknown_tensors"]["model.layers.2.gain"] == "layers/2/dense.safetensors"
    assert "'pytorch_model.bin' (weights in another form)" in plan["left_out"]
    assert "LICENSE" in plan["auxiliary"]
    text = program("reshard", "plan", v3_folder).out
    assert f"payload    {plan['payload_bytes']:,} bytes" in text
    assert f"inodes     {plan['needed_inodes']:,} files and folders, " in text
    assert "unknown    vision_tower.proj.weight, kept in model/dense.safetensors" in text
    assert "left out   'consolidated.safetensors' (weights in another form)" in text
    assert tree(tmp_path) == {}


def one_tensor(folder: Path, size: int) -> Path:
    """A checkpoint of one shard with one tensor of random bytes."""
    (folder / "model.safetensors").write_bytes(one_header(size) + os.urandom(size))
    return folder


def one_header(size: int) -> bytes:
    header = b'{"lm_head.weight":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    return len(header).to_bytes(8, "little") + header


def test_plan_measures_a_disk_that_is_large_enough(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 20_000_000
    one_tensor(tmp_path, size)
    plan = program("reshard", "plan", tmp_path, "--json").json
    assert plan["read_bytes_per_s"] > 0
    assert plan["limited_by"] in ("the disk", "hashing")
    for hash_rate, cores, limit in ((1e15, 1, "the disk"), (1e6, 2, "hashing")):
        monkeypatch.setattr("reshard.cli_plan.measure_hash_rate", lambda rate=hash_rate: rate)
        monkeypatch.setattr("reshard.cli_plan.hashing_cores", lambda _, cores=cores: cores)
        plan = program("reshard", "plan", tmp_path, "--json").json
        seconds = 2 * size / plan["read_bytes_per_s"] if limit == "the disk" else 2 * size / 2e6
        assert (plan["seconds"], plan["limited_by"]) == (pytest.approx(seconds), limit)
    assert "time       about 20.0 s, limited by hashing: read here at " in program("reshard", "plan", tmp_path).out


def test_plan_of_a_part(program: Program, v3_folder: Path) -> None:
    plan = program("reshard", "plan", v3_folder, "--layers", "1-2", "--experts", "0,10", "--json").json
    assert plan["expert_files"] == 4
    assert plan["left_out_tensors"] > 0
    assert "selection  leaves out" in program("reshard", "plan", v3_folder, "--layers", "1").out


def test_run(program: Program, v3_folder: Path, v3_resharded: Path, tmp_path: Path, tree: Tree) -> None:
    result = program("reshard", "run", v3_folder, tmp_path / "a", "--json", "--jobs", 3)
    assert (result.code, result.err) == (0, "")
    end = last(result)
    assert end.keys() == {
        "event", "path", "files", "documents", "bytes", "moved_bytes", "kept_bytes", "seconds", "read_bytes_per_s",
        "share_of_disk", "unknown_tensors", "left_out",
    }  # fmt: skip
    assert end["path"] == str(tmp_path / "a")
    assert end["files"] == 42
    assert len(end["unknown_tensors"]) == 3
    assert tree(tmp_path / "a") == tree(v3_resharded)
    result = program("reshard", "run", v3_folder, tmp_path / "b")
    assert result.out.startswith(f"{tmp_path}/b: 42 files, ")
    assert result.out.count("\n") == 1
    assert "note: a name that no rule knows: model.layers.2.gain, kept in layers/2/dense.safetensors" in result.err
    assert f"next: reshard restore {tmp_path}/b --check" in result.err
    assert program("reshard", "run", v3_folder, tmp_path / "c", "-q").err == ""
    assert "config.json" not in result.err
    (tmp_path / "bare").mkdir()
    one_tensor(tmp_path / "bare", 10)
    result = program("reshard", "run", tmp_path / "bare", tmp_path / "d")
    assert f"note: {tmp_path}/bare has no config.json: without it the result cannot be run" in result.err


def test_a_run_into_what_is_there(program: Program, v3_folder: Path, tmp_path: Path, tree: Tree) -> None:
    program("reshard", "run", v3_folder, tmp_path / "out", "--layers", "1")
    part = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    result = program("reshard", "run", v3_folder, tmp_path / "out", "-q")
    assert re.search(r": 42 files, [0-9.]+ MB; [0-9.]+ kB of it in .*B/s, the rest was there already\n", result.out)
    before = tree(tmp_path / "out")
    result = program("reshard", "run", v3_folder, tmp_path / "out", "-q")
    assert re.search(r": 42 files, [0-9.]+ MB, all of it was there already\n", result.out)
    assert tree(tmp_path / "out") == before
    end = last(program("reshard", "run", v3_folder, tmp_path / "out", "--json"))
    assert (end["moved_bytes"], end["kept_bytes"] < end["bytes"], end["kept_bytes"] > part / 2) == (0, True, True)


def test_the_rate_as_a_share_of_the_disks(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    one_tensor(tmp_path / "source", 8 * BLOCK_BYTES)
    run = ("reshard", "run", tmp_path / "source")
    # Smaller than what is worth measuring.
    assert last(program(*run, tmp_path / "a", "--json"))["share_of_disk"] is None
    monkeypatch.setattr(cli, "SAMPLE_SHARE", 1)
    end = last(program(*run, tmp_path / "b", "--json"))
    assert end["share_of_disk"] == pytest.approx(2 * 8 * BLOCK_BYTES / end["seconds"] / end["read_bytes_per_s"])
    assert re.search(r"/s, [0-9]+% of what this disk reads and writes\n", program(*run, tmp_path / "c", "-q").out)
    monkeypatch.setattr(cli, "same_disk", lambda *_: False)
    assert re.search(r"/s, [0-9]+% of what the disk of the source reads\n", program(*run, tmp_path / "d", "-q").out)
    # Nothing moved, nothing measured; and holes are not read.
    assert "%" not in program(*run, tmp_path / "d", "-q").out
    os.truncate(tmp_path / "source" / "model.safetensors", 2 * BLOCK_BYTES)
    os.truncate(tmp_path / "source" / "model.safetensors", 8 * BLOCK_BYTES + len(one_header(8 * BLOCK_BYTES)))
    assert last(program(*run, tmp_path / "e", "--json"))["share_of_disk"] is None


def test_a_part_is_not_said_to_be_provable(program: Program, v3_folder: Path, tmp_path: Path) -> None:
    result = program("reshard", "run", v3_folder, tmp_path / "part", "--layers", "1")
    assert (result.code, "--check" in result.err) == (0, False)


def test_a_dry_run_is_a_plan(program: Program, v3_folder: Path, tmp_path: Path, tree: Tree) -> None:
    dry = program("reshard", "run", v3_folder, tmp_path / "out", "--dry-run", "--json").json
    plan = program("reshard", "plan", v3_folder, tmp_path / "out", "--json").json
    others = {"free_bytes": 0, "free_inodes": 0}  # who use the disk too
    assert dry | others == plan | others
    assert "payload " in program("reshard", "run", v3_folder, tmp_path / "out", "--dry-run").out
    assert tree(tmp_path) == {}


def test_verify(program: Program, v3_resharded: Path, resharded_copy: Path, v3_folder: Path) -> None:
    result = program("reshard", "verify", v3_resharded)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("read, every digest is right\n")
    result = program("reshard", "verify", v3_resharded, "--against", v3_folder, "--json")
    found = {"event": "end", "path": str(v3_resharded), "ok": True, "damage": [], "unnamed": [], "unproven": []}
    assert (result.code, last(result)) == (0, found)
    (resharded_copy / "notes.txt").touch()
    raw = bytearray((resharded_copy / "model/embed.safetensors").read_bytes())
    raw[4096] ^= 1
    (resharded_copy / "model/embed.safetensors").write_bytes(raw)
    result = program("reshard", "verify", resharded_copy, "--json")
    assert result.code == 13
    assert last(result) == {
        "event": "end",
        "path": str(resharded_copy),
        "ok": False,
        "damage": [
            {
                "path": "model/embed.safetensors", "tensor": "model.embed_tokens.weight", "begin": 4096,
                "end": 4096 + 67 * 136 * 2, "message": "its bytes are damaged",
            }
        ],
        "unnamed": ["notes.txt"],
        "unproven": [],
    }  # fmt: skip
    result = program("reshard", "verify", resharded_copy)
    assert (result.code, result.err.splitlines()) == (
        13,
        [
            "note: 1 file is in the folder and not in the manifest: notes.txt",
            f"next: reshard repair {resharded_copy} --from SRC   takes what is damaged from the shards or another copy",
        ],
    )
    assert program("reshard", "verify", resharded_copy, "-q").err == ""
    where = f"model/embed.safetensors: tensor model.embed_tokens.weight bytes 4096-{4096 + 67 * 136 * 2}"
    assert result.out == f"{where}: its bytes are damaged\n"


def test_verify_against_another_model(program: Program, v3_resharded: Path, v2_folder: Path) -> None:
    result = program("reshard", "verify", v3_resharded, "--against", v2_folder)
    assert result.code == 13
    assert "model-00001-of" in result.out


def test_restore(program: Program, v3_resharded: Path, v3_folder: Path, tmp_path: Path) -> None:
    result = program("reshard", "restore", v3_resharded, "--check", "--json")
    assert (result.code, result.err) == (0, "")
    end = last(result)
    assert end.keys() == {"event", "path", "shards"}
    assert end["shards"][0].keys() == {"name", "size", "sha256"}
    assert end["path"] == str(v3_resharded)
    shards = len(list(v3_folder.glob("model-*.safetensors")))
    assert f"all {shards} source shards" in program("reshard", "restore", v3_resharded, "--check").out
    result = program("reshard", "restore", v3_resharded, tmp_path / "a")
    assert result.out.startswith(f"{tmp_path}/a: {shards} shards")
    end = last(program("reshard", "restore", v3_resharded, tmp_path / "b", "--json"))
    assert end["path"] == str(tmp_path / "b")


@pytest.mark.parametrize(
    "arguments",
    [
        ["restore", "x"], ["restore", "x", "y", "--check"], ["run", "x"], ["plan"], ["verify"], ["repair"],
        ["run", "x", "y", "--jobs", "0"], ["run", "x", "y", "--jobs", "65"], ["run", "x", "y", "--layers", "5-3"],
        ["run", "x", "y", "--force"], ["doctor", "x"],
    ],
)  # fmt: skip
def test_usage(program: Program, arguments: list[str]) -> None:
    result = program("reshard", *arguments)
    assert (result.code, result.out) == (2, "")


@pytest.mark.parametrize("command", [["plan"], ["run"], ["verify"], ["restore"]])
def test_what_is_not_there(program: Program, command: list[str], tmp_path: Path, tree: Tree) -> None:
    more = {"run": [tmp_path / "out"], "restore": [tmp_path / "out"]}.get(command[0], [])
    result = program("reshard", *command, tmp_path / "absent", *more)
    assert (result.code, result.out, result.err.count("\n")) == (10, "", 1)
    assert tree(tmp_path) == {}


def test_a_selection_of_what_is_not_there(program: Program, v3_folder: Path, tmp_path: Path) -> None:
    result = program("reshard", "run", v3_folder, tmp_path / "out", "--layers", "61")
    assert (result.code, result.out) == (2, "")
    assert "the checkpoint has no layer 61" in result.err
    assert not (tmp_path / "out").exists()


ONE_AFTER_THE_OTHER = r"""
import sys
from reshard.cli import reshard
source, out = sys.argv[1:]
run = ["run", source, out]
for arguments in (run, ["verify", out], ["restore", out, "--check"], ["plan", out], run):
    try:
        reshard.main(arguments, prog_name="reshard")
    except SystemExit as ended:
        print(f"exit {ended.code}", flush=True)
"""


def test_a_path_that_is_not_utf8(v2_folder: Path, tmp_path: Path) -> None:
    """It cannot be printed as it is, and that is no reason to fail when all the work is done."""
    out = os.fsencode(tmp_path) + b"/\xff\x1b[2J"
    result = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, v2_folder, out], capture_output=True, check=False, text=True
    )
    assert "Traceback" not in result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("exit")] == [
        "exit 0", "exit 0", "exit 0", "exit 12", "exit 0",
    ]  # fmt: skip
    assert result.stdout.count("\\udcff\\x1b[2J") == 4
    assert "\x1b" not in result.stdout + result.stderr


def test_progress_is_drawn_on_terminals_only(v3_folder: Path, tmp_path: Path) -> None:
    for quiet in (False, True):
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 100))
        command = [sys.executable, "-m", "reshard", "run", str(v3_folder), str(tmp_path / str(quiet))]
        process = subprocess.Popen(
            [*command, "--json", *(["-q"] if quiet else [])], stdout=subprocess.PIPE, stderr=slave
        )
        os.close(slave)
        drawn = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # how Linux says that the other side is closed
                break
            if not part:
                break
            drawn += part
        out, _ = process.communicate()
        os.close(master)
        assert process.returncode == 0
        assert json.loads(out.splitlines()[-1])["event"] == "end"
        assert (b"reshard" in drawn and b"B/s" in drawn) is not quiet


def test_a_plan_for_a_place_that_cannot_be_written(
    v2_folder: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, who may write everywhere: so the answer is given."""
    access, out = os.access, tmp_path / "below" / "out"
    program("reshard", "run", v2_folder, tmp_path / "whole")
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK))
    for command in (("plan",), ("run", "--dry-run")):
        result = program("reshard", *command, v2_folder, out)
        assert (result.code, result.out) == (1, "")
        assert result.err == f"reshard: {out}: {tmp_path} may not be written to; choose another folder\n"
    # Where nothing is left to write nothing is refused.
    assert program("reshard", "plan", v2_folder, tmp_path / "whole").code == 0
    (tmp_path / "file").touch()
    result = program("reshard", "plan", v2_folder, tmp_path / "file" / "out")
    assert (result.code, result.err) == (
        1, f"reshard: {tmp_path}/file/out: {tmp_path}/file is a file; choose another folder\n",
    )  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_plan_and_run_refuse_the_same_place(v2_folder: Path, tmp_path: Path) -> None:
    """With the system's own answer."""
    source = shutil.copytree(v2_folder, tmp_path / "source")
    # pytest's own folders are root's alone.
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    code = f"""
import os, sys
sys.path[:] = {sys.path!r}
from reshard.cli import reshard
os.setuid(65534)
reshard.main([sys.argv[1], {str(source)!r}, {str(tmp_path / "out")!r}])
"""
    for command, says in (("plan", "may not be written to"), ("run", "cannot be written: Permission denied")):
        done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"reshard: {tmp_path / 'out'}: ")
        assert says in done.stderr


def test_what_may_not_be_read_is_not_to_be_repaired(
    v2_resharded: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, who may read everything: so the answers are given."""
    out = shutil.copytree(v2_resharded, tmp_path / "out")
    path = next(out.glob("layers/*/dense.safetensors"))
    path.write_bytes(bytes(path.stat().st_size))
    assert "next: reshard repair" in program("reshard", "verify", out).err
    access = os.access
    monkeypatch.setattr(os, "access", lambda some, mode: Path(some) != path and access(some, mode))
    result = program("reshard", "verify", out)
    assert result.code == 13
    assert "repair" not in result.err
    assert f"next: let 1 file {path.relative_to(out)} be read (chmod, chown), and verify again\n" in result.err


def test_one_shard_is_no_shards(single_folder: Path, tmp_path: Path, program: Program) -> None:
    assert ": 1 shard, " in program("reshard", "plan", single_folder).out
    assert program("reshard", "run", single_folder, tmp_path / "out").code == 0
    assert ": the source shard (" in program("reshard", "restore", tmp_path / "out", "--check").out
    assert ": 1 shard (" in program("reshard", "restore", tmp_path / "out", tmp_path / "back").out
