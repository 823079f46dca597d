"""What the benchmarks measure with: a figure that is wrong is worse than none."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tools() -> Iterator[SimpleNamespace]:
    """The modules by name; they stand beside scripts and find each other by bare names."""
    names = ("bench_full_scale", "consume_peak", "dense", "layouts", "measure", "raw_copy", "scratch", "sparse")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def direct_path(tmp_path: Path) -> Path:
    """A folder whose file system reads and writes past the page cache."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("no O_DIRECT here")
    (tmp_path / "probe").unlink()
    return tmp_path


SIZES = (0, 1, 4096, 4097, 8 << 20, (8 << 20) + 1, (24 << 20) - 1)


def write_files(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = [folder / str(size) for size in SIZES]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(os.urandom(size))
    return paths


@pytest.mark.usefixtures("deadline")
def test_the_raw_copy_is_a_copy(tools: SimpleNamespace, direct_path: Path) -> None:
    paths = write_files(direct_path / "in")
    (direct_path / "out").mkdir()
    tools.raw_copy.copy([(path, direct_path / "out" / path.name) for path in paths])
    for path in paths:
        assert (direct_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("deadline")
def test_a_raw_copy_that_cannot_write_ends(
    tools: SimpleNamespace, direct_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_files(direct_path / "in")
    pairs = [(path, direct_path / f"copy of {path.name}") for path in paths]
    pairs[0][1].touch()
    with pytest.raises(FileExistsError):
        tools.raw_copy.copy(pairs)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full"):
        tools.raw_copy.copy([(paths[-1], direct_path / "more")])


def test_a_dense_checkpoint_has_its_layout_and_no_hole(
    tools: SimpleNamespace, direct_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.dense, "_BLOCK_BYTES", 1 << 20)  # several of them, as in a large shard
    layout = tools.layouts.deepseek_v3_part(1)
    tools.dense.write_dense(direct_path, layout)
    for shard in layout.shards:
        data = (direct_path / shard.name).read_bytes()
        assert len(data) == shard.size
        assert data.startswith(shard.header)
        pages = [data[at : at + 4096] for at in range(-(-len(shard.header) // 4096) * 4096, len(data), 4096)]
        assert len(set(pages)) == len(pages)
    assert tools.sparse.allocated_bytes(direct_path) >= layout.size


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_programs_peak_is_its_own(tools: SimpleNamespace, tmp_path: Path) -> None:
    """This process has torch in it by now, or gets as large here: none of that is the program's."""
    large = bytearray(os.urandom(1 << 20)) * 400
    small = tools.measure.run(program("print(1)"), folder=tmp_path)
    assert len(large) > 400_000_000
    assert small.peak_bytes < 100_000_000
    assert small.out == "1\n"
    used = tools.measure.run(program("x = bytearray(b'x') * 300_000_000"), folder=tmp_path)
    assert 300_000_000 < used.peak_bytes < 400_000_000


def test_a_programs_time_is_its_own_and_its_childrens(tools: SimpleNamespace, tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    used = tools.measure.run(["sh", "-c", '"$0" -c "$1"; sleep 0.2', sys.executable, busy], folder=tmp_path)
    assert used.cpu_seconds >= 0.3
    assert used.seconds >= 0.5
    assert used.over(10**9)["cpu_s_per_gb"] == round(used.cpu_seconds, 3)
    assert used.over(10**9)["gb_per_s"] == round(1 / used.seconds, 3)


def test_a_program_that_fails_is_told_with_what_it_said(tools: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(tools.measure.CommandError, match=r"(?s)ended with 3:.*no such luck"):
        tools.measure.run(program("import sys; print('no such luck', file=sys.stderr); sys.exit(3)"), folder=tmp_path)
    with pytest.raises(tools.measure.CommandError, match="ended with 137"):
        tools.measure.run(program("import os; os.kill(os.getpid(), 9)"), folder=tmp_path)
    with pytest.raises(tools.measure.CommandError, match=r"No such file .*no-such-program"):
        tools.measure.run(["no-such-program"], folder=tmp_path)


@pytest.mark.parametrize("indent", [None, 2])
def test_the_last_document_is_the_result(tools: SimpleNamespace, indent: int | None) -> None:
    out = "\n".join(json.dumps({"number": number, "in": {}}, indent=indent) for number in range(3)) + "\n"
    measured = tools.measure.Measured(seconds=1, cpu_seconds=1, peak_bytes=1, out=out)
    assert measured.last_json == {"number": 2, "in": {}}


def test_the_peak_of_disk_is_seen(tools: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(bytes(1_000_000))
    peak = tools.consume_peak.Peak([tmp_path, tmp_path / "later"])
    with peak.watch():
        (tmp_path / "later").mkdir()
        (tmp_path / "later" / "new").write_bytes(bytes(5_000_000))
        looks = peak.looks
        while peak.looks < looks + 2:
            time.sleep(0.01)
        (tmp_path / "later" / "new").unlink()
        looks = peak.looks
        while peak.looks < looks + 2:
            time.sleep(0.01)
    assert 5_000_000 <= peak.extra < 5_500_000
    assert peak.over().keys() == {"extra_bytes", "free_space_shrank_by", "looks"}


@pytest.fixture
def copied(tools: SimpleNamespace, tmp_path: Path) -> tuple[Any, Path, Path]:
    """A small layout as sparse files, and a copy: the same tensors in valid files, so a reshard of its kind."""
    layout = tools.layouts.deepseek_v3_part(10_000_000)
    source, copy = tmp_path / "source", tmp_path / "copy"
    for folder in (source, copy):
        folder.mkdir()
        tools.sparse.write_sparse(folder, layout, random_bytes=2_000_000)
    return layout, source, copy


def test_a_rehearsal_compares_every_tensor(tools: SimpleNamespace, copied: tuple[Any, Path, Path]) -> None:
    layout, source, copy = copied
    compare = tools.bench_full_scale.compare_tensors
    assert compare(layout, source, copy) == layout.tensor_count
    for shard in layout.shards:
        for tensor in shard.tensors:
            for place in (tensor.begin, (tensor.begin + tensor.end) // 2, tensor.end - 1):
                flip(copy / shard.name, len(shard.header) + place)
                with pytest.raises(SystemExit, match=f"{re.escape(tensor.name)} is not the tensor"):
                    compare(layout, source, copy)
                flip(copy / shard.name, len(shard.header) + place)
    first = copy / layout.shards[0].name
    header = layout.shards[0].header
    overwrite(first, header.replace(b"[1536,7168]", b"[7168,1536]"))
    with pytest.raises(SystemExit, match="is not the tensor"):
        compare(layout, source, copy)
    overwrite(first, header)
    first.rename(copy / "other.safetensors")
    assert compare(layout, source, copy) == layout.tensor_count
    shutil.copy(copy / "other.safetensors", first)
    with pytest.raises(SystemExit, match="or in two files"):
        compare(layout, source, copy)
    first.unlink()
    (copy / "other.safetensors").unlink()
    with pytest.raises(SystemExit, match=f"has no {re.escape(layout.shards[0].tensors[0].name)}, nor"):
        compare(layout, source, copy)


def test_a_rehearsal_compares_every_file(tools: SimpleNamespace, copied: tuple[Any, Path, Path]) -> None:
    layout, source, copy = copied
    compare = tools.bench_full_scale.compare_shards
    assert compare(layout, source, copy) == len(layout.shards)
    for path in source.iterdir():
        last = path.stat().st_size - 1
        flip(copy / path.name, last)
        with pytest.raises(SystemExit, match=f"{path.name}: differs from the source from byte {last} on"):
            compare(layout, source, copy)
        flip(copy / path.name, last)
    (copy / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"config\.json: was not restored"):
        compare(layout, source, copy)


def overwrite(path: Path, start: bytes) -> None:
    with path.open("r+b") as file:
        file.write(start)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(1)[0]
        file.seek(at)
        file.write(bytes([before ^ 1]))


def test_a_workspace_wants_room(tools: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="GB free"), tools.scratch.workspace(tmp_path, 1 << 60):
        pass
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from measure import run
from scratch import workspace

with workspace(Path(sys.argv[2]), 0) as folder:
    (folder / "below").mkdir()
    (folder / "below" / "large").write_bytes(bytes(100))
    code = "import os, time; print(os.getpid()); open('ready', 'w').write(str(os.getpid())); time.sleep(60)"
    run([sys.executable, "-c", code], folder=folder)
"""


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_program_and_removes_everything(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", INTERRUPTED, HERE, tmp_path]
    benchmark = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        while not (found := [path for path in tmp_path.glob("*/ready") if path.read_text()]):
            time.sleep(0.01)
        measured = int(found[0].read_text())
        benchmark.send_signal(number)
        _, said = benchmark.communicate()
    finally:
        benchmark.kill()
    assert b"KeyboardInterrupt" in said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(measured, 0)


def test_the_benchmark_of_speed_runs(direct_path: Path) -> None:
    """At a size where nothing it says means anything."""
    command = [sys.executable, HERE / "bench_reshard.py", "--dir", "here", "--gb", "0.001", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=direct_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    document = json.loads(line)
    for way in ("raw", "cp", "reshard", "naive", "verify", "restore_check"):
        assert document[way]["gb_per_s"] > 0
        assert document[way]["peak_bytes"] > 0
        assert way in done.stderr
    assert document["ratio_raw"] == document["ratio_raw_rounds"][0]
    assert document["ratio_cp"] == pytest.approx(document["cp"]["seconds"] / document["reshard"]["seconds"], abs=0.02)
    assert list((direct_path / "here").iterdir()) == []
