"""`--ram`, `--io` and `runner bench`: what they promise on the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import manifests
from runner import demo, kernels

Call = Callable[..., Result]
Document = Callable[..., dict[str, Any]]
compiled_only = pytest.mark.skipif(not kernels.supported(), reason="mapped weights need the compiled library")


def test_too_little_memory_is_refused_with_the_floor(call: Call) -> None:
    for command in (("generate", "-p", "x"), ("logits", "-p", "x"), ("bench",)):
        result = call(*command, "--ram", "50M")
        assert (result.exit_code, result.stdout) == (15, "")
        assert result.stderr.startswith("runner: this model needs at least ")
        assert result.stderr.endswith("but --ram is 50.0 MB; give more, or a smaller --ctx\n")


@pytest.mark.parametrize("size", ["", "12X", "-3G", "1e9", "G", "1.5.2G", "3 parsecs", "1iB", "9" * 40])
def test_what_is_no_size_is_a_usage_error(call: Call, size: str) -> None:
    result = call("generate", "-p", "x", "--ram", size)
    assert result.exit_code == 2
    assert "is not a size; write it like 500M, 16G or 1.5GiB" in result.stderr


@compiled_only
def test_the_text_is_the_same_whatever_the_memory(call: Call) -> None:
    texts = {
        call("generate", "-p", "import ", "-n", "8", "--seed", "3", "--io", io, "--ram", ram, "-q").stdout
        for io in ("mmap", "direct")
        for ram in ("1.5GiB", "8G")
    }
    assert len(texts) == 1


def test_pinned_experts_are_read_first_and_the_text_is_the_same(call: Call, document: Document, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    asked = ("generate", "-p", "import ", "-n", "8", "--seed", "3", "--ram", "1.5GiB", "--io", "direct")
    assert call("trace", "-p", "import ", "-n", "8", "--out", path, "-q").exit_code == 0
    plain, pinned = document(*asked), document(*asked, "--pin", path)
    assert pinned["ids"] == plain["ids"]
    # Read before the run began; nothing that the trace used is missed in it.
    assert pinned["stats"]["expert_misses"] < plain["stats"]["expert_misses"] / 2


@pytest.mark.parametrize(("text", "code"), [("{}", 12), (None, 10)])
def test_a_pin_that_is_no_trace_is_refused(call: Call, tmp_path: Path, text: str | None, code: int) -> None:
    path = tmp_path / "trace.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    result = call("generate", "-p", "x", "--pin", path)
    assert (result.exit_code, result.stdout) == (code, "")
    assert str(path) in result.stderr


def test_a_trace_of_another_kind_of_model_is_refused(
    tiny_checkpoint: Path, call: Call, change: Callable[..., None], tmp_path: Path
) -> None:
    """Layers and experts may agree by chance."""
    path = tmp_path / "trace.json"
    assert call("trace", "-m", tiny_checkpoint, "-p", "hello", "-n", "3", "--out", path, "-q").exit_code == 0
    change(tmp_path, path.name, model_type="another")
    result = call("generate", "-m", tiny_checkpoint, "-p", "hello", "--pin", path)
    assert (result.exit_code, result.stdout) == (12, "")
    assert f"the trace is of another model than {tiny_checkpoint}: of 'another'" in result.stderr


def test_a_trace_of_another_model_is_refused(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    one = {"tokens": 1, "experts": {"77": [0]}}
    trace = {
        "format": "expert-trace", "version": 1, "model_type": "deepseek_v3", "layers": [77], "experts": 4,
        "experts_per_token": 1, "passes": [one], "usage": {"77": {"0": 1}},
    }  # fmt: skip
    path.write_text(json.dumps(trace), encoding="utf-8")
    result = call("generate", "-p", "x", "--pin", path)
    assert result.exit_code == 12
    assert "the trace is of another model" in result.stderr


BENCH = [
    "settings", "open_s", "first", "warm_up", "decode", "fixed_bytes", "memory_read_gbps", "disk_read_gbps",
    "peak_bytes",
]  # fmt: skip
PHASE = [
    "tokens", "seconds", "tokens_per_s", "median_pass_s", "read_bytes", "expert_hits", "expert_misses", "hit_rate",
    "wait_s", "fetched_bytes", "fetch_wait_s", "compute_s", "floor_s", "share_of_floor",
]  # fmt: skip


@compiled_only
def test_bench_ends_in_one_line_of_json(call: Call) -> None:
    result = call("bench", "--prompt-tokens", "5", "-n", "4")
    assert result.exit_code == 0
    *card, last = result.stdout.splitlines()
    found = json.loads(last)
    assert list(found) == BENCH
    for phase in ("first", "warm_up", "decode"):
        assert list(found[phase]) == PHASE
    assert (found["first"]["tokens"], found["decode"]["tokens"]) == (5, 4)
    assert (found["first"]["expert_hits"], found["decode"]["expert_misses"]) == (0, 0)
    assert found["decode"]["hit_rate"] == 1.0
    assert [line.split()[0] for line in card] == ["open", "memory", "disk", "first", "read", "decode", "read"]
    assert json.loads(call("bench", "--prompt-tokens", "5", "-n", "4", "--json").stdout)["settings"]["tokens"] == 4


@compiled_only
@pytest.mark.parametrize("io", ["mmap", "direct"])
def test_the_floor_counts_what_experts_hold_and_not_the_room_they_get(document: Document, io: str) -> None:
    """In original shards a slot of the window is many times as large as one of these experts."""
    expert = sum(len(tensor.data) for tensor in manifests.open(demo.path()).expert(1, 0).values())
    found = document("bench", "--prompt-tokens", "5", "-n", "4", "--io", io)
    decode = found["decode"]
    assert decode["expert_hits"] == 4 * 3 * 8
    assert found["settings"]["expert_bytes"] == expert
    assert found["settings"]["slot_bytes"] > 1.5 * expert
    moved = found["fixed_bytes"] * 4 + decode["expert_hits"] * expert
    floor = decode["read_bytes"] / found["disk_read_gbps"] + moved / found["memory_read_gbps"]
    assert decode["floor_s"] == pytest.approx(floor / 1e9, rel=1e-6)


def test_bench_with_given_ids(call: Call, document: Document, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(list(range(20, 30))), encoding="utf-8")
    assert document("bench", "--ids", ids, "--prompt-tokens", "6", "-n", "4")["decode"]["tokens"] == 4
    few = call("bench", "--ids", ids, "--prompt-tokens", "8", "-n", "4")
    assert (few.exit_code, "has 10 ids" in few.stderr) == (2, True)


def test_bench_without_its_file_or_with_foreign_ids(call: Call, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    assert call("bench", "--ids", ids).exit_code == 10
    ids.write_text(json.dumps([4096] * 60), encoding="utf-8")
    result = call("bench", "--ids", ids)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("runner: token id 4096 is outside the vocabulary of 4096")


def test_without_the_compiled_library_experts_are_read(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(kernels, "active", lambda: None)
    assert call("generate", "-p", "import ", "-n", "2").exit_code == 0
    refused = call("generate", "-p", "import ", "-n", "2", "--io", "mmap")
    assert (refused.exit_code, refused.stdout) == (15, "")
    assert refused.stderr.endswith("use --io direct\n")


@pytest.mark.parametrize("text", ["", "{}", "[1, -1]", "[true]", "[1.0]", "[" * 100_000, '["a"]', "[4294967296]"])
def test_bench_refuses_what_is_no_list_of_ids(call: Call, tmp_path: Path, text: str) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(text, encoding="utf-8")
    result = call("bench", "--ids", ids)
    assert (result.exit_code, result.stdout) == (12, "")
    assert f"{ids}: not a JSON list of token ids" in result.stderr


@compiled_only
@pytest.mark.parametrize("io", ["mmap", "direct"])
def test_an_expert_file_that_is_cut_while_the_model_runs(tmp_path: Path, io: str) -> None:
    """In a process of its own: the exit code is 13, and no signal ends it."""
    folder = tmp_path / "experts"
    subprocess.run([sys.executable, "-m", "reshard", "run", demo.path(), folder, "--quiet"], check=True)
    code = (
        "import os, sys, itertools\n"
        "from pathlib import Path\n"
        "from runner.cli import runner\n"
        "from runner.model import Model\n"
        "logits, steps = Model.logits, itertools.count()\n"
        "def cut(self, hidden):\n"
        "    if next(steps) == 2:\n"
        "        for path in Path(sys.argv[1]).glob('layers/*/experts/*'):\n"
        "            os.truncate(path, 4096)\n"
        "    return logits(self, hidden)\n"
        "Model.logits = cut\n"
        "runner(['generate', '-m', sys.argv[1], '-p', 'import ', '-n', '30', '--temp', '0', '--io', sys.argv[2]])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder, io], capture_output=True, text=True, check=False)
    assert done.returncode == 13, done.stderr
    assert "experts/" in done.stderr
    assert "Traceback" not in done.stderr


# --- a control group that has little memory ---


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group below our own whose limits can be set; not every machine lets us make one."""
    inside = Path("/proc/self/cgroup").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    lines = [line.split(":", 2) for line in inside.splitlines()]
    memory = next((path for _, names, path in lines if "memory" in names.split(",")), None)
    top = Path("/sys/fs/cgroup/memory")
    folder = top / (memory or "/").strip("/") / f"runner-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no memory control group (version 1) can be made here")
    yield folder
    folder.rmdir()


@compiled_only
@pytest.mark.parametrize("io", ["mmap", "direct"])
def test_a_run_stays_within_its_memory(group: Path, tmp_path: Path, io: str) -> None:
    """The limit is what --ram says; above it the system would end the process."""
    limit = 900_000_000
    (group / "memory.limit_in_bytes").write_text(str(limit))
    shutil.copytree(demo.path(), tmp_path / "model")
    code = (
        "import os, sys\n"
        "open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from runner.cli import runner\n"
        "runner(sys.argv[2:])\n"
    )
    arguments = ["generate", "-m", str(tmp_path / "model"), "-p", "import ", "-n", "20", "--io", io, "--json"]
    plain = subprocess.run([sys.executable, "-m", "runner", *arguments], capture_output=True, text=True, check=True)
    for ram in ([], ["--ram", str(limit)]):
        done = subprocess.run(
            [sys.executable, "-c", code, group, *arguments, *ram], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ids"] == json.loads(plain.stdout)["ids"]
    # Without --ram the group's limit is what there is; one that is too small is refused, not run into.
    (group / "memory.limit_in_bytes").write_text("340000000")
    done = subprocess.run([sys.executable, "-c", code, group, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 15, (done.returncode, done.stderr)
    assert "this machine has" in done.stderr
