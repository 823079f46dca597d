"""The mover: every byte arrives, in any number of workers, and a source that changes under it is refused."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import manifests
from manifests.errors import IntegrityError, ManifestError, ResourceError, ToolkitError
from reshard import blocks
from reshard import transfer as transfer_module
from reshard.discard import discard
from reshard.progress import Progress

Tree = Callable[[Path], dict[str, str]]


def test_every_tensor_arrives(v3_resharded: Path, v3_bytes: dict[str, bytes]) -> None:
    checkpoint = manifests.open(v3_resharded)
    for file in checkpoint.manifest.files:
        raw = (v3_resharded / file.path).read_bytes()
        assert len(raw) == file.size
        for tensor in file.tensors:
            data = raw[tensor.offset : tensor.offset + tensor.size]
            assert data == v3_bytes[tensor.name]
            assert hashlib.sha256(data).hexdigest() == tensor.digest


def test_shards_are_hashed_in_the_same_pass(v3_resharded: Path, v3_folder: Path) -> None:
    source = manifests.open(v3_resharded).manifest.source
    assert source is not None
    assert len(source.shards) == len(list(v3_folder.glob("model-*.safetensors")))
    for shard in source.shards:
        raw = (v3_folder / shard.name).read_bytes()
        assert (shard.size, shard.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
@given(block=st.integers(1, 9000), jobs=st.integers(1, 9))
def test_neither_blocks_nor_jobs_change_a_byte(
    block: int, jobs: int, v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    if not (tmp_path / "expected").exists():
        reshard_folder(v2_folder, tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block)
        reshard_folder(v2_folder, tmp_path / "out", jobs=jobs)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def flip_in_header(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[10] ^= 1
    path.write_bytes(raw)


def replace_by_another(path: Path) -> None:
    """The same size, other names: what a download that goes on would do."""
    raw = path.read_bytes().replace(b'"shape"', b'"shap\\u0065"')
    path.write_bytes(raw)


CHANGES: dict[str, tuple[Callable[[Path], Any], type[ToolkitError]]] = {
    "header changed": (flip_in_header, ManifestError),
    "replaced": (replace_by_another, ManifestError),
    "cut in the header": (lambda path: os.truncate(path, 20), IntegrityError),
    "cut in the payload": (lambda path: os.truncate(path, path.stat().st_size - 1), IntegrityError),
    "emptied": (lambda path: os.truncate(path, 0), IntegrityError),
    "grown": (lambda path: os.truncate(path, path.stat().st_size + 1), ManifestError),
    "gone": (lambda path: path.unlink(), ToolkitError),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), ToolkitError),
}


@pytest.mark.parametrize(("change", "error"), CHANGES.values(), ids=CHANGES.keys())
def test_a_source_that_changed_since_the_plan_is_refused(
    v3_copy: Path, v3_folder: Path, v3_resharded: Path, tmp_path: Path, change: Callable[[Path], Any],
    error: type[ToolkitError], plan_of: Callable[..., Any], run_planned: Callable[..., Any], tree: Tree,
    reshard_folder: Callable[..., Path],
) -> None:  # fmt: skip
    source, plan = plan_of(v3_copy)
    path = next(v3_copy.glob("model-00007-*"))
    change(path)
    with pytest.raises(error):
        run_planned(source, plan, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(ToolkitError, match=path.name):
        reshard_folder(v3_copy, tmp_path / "out")
    if path.is_dir():
        path.rmdir()
    shutil.copy2(v3_folder / path.name, path)
    discard(v3_copy, tmp_path / "out")
    assert tree(tmp_path / "out") == {}
    assert tree(reshard_folder(v3_copy, tmp_path / "out")) == tree(v3_resharded)


@pytest.mark.parametrize("change", ["same size", "shrunk", "grown", "replaced by rename"])
def test_a_source_that_changes_while_it_is_read_is_refused(
    v3_copy: Path, tmp_path: Path, change: str, plan_of: Callable[..., Any], run_planned: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, plan = plan_of(v3_copy)
    shard = next(iter(source.shards))
    path = v3_copy / shard
    advance, done = Progress.advance, []

    def tamper(self: Progress, count: int) -> None:
        advance(self, count)
        if done:
            return
        done.append(1)
        if change == "same size":
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"?")
            os.utime(path, ns=(1, 1))  # not left to the clock's grain
        elif change == "shrunk":
            os.truncate(path, path.stat().st_size - 1)
        elif change == "grown":
            os.truncate(path, path.stat().st_size + 1)
        else:
            shutil.copy(path, tmp_path / "new")
            os.rename(tmp_path / "new", path)

    monkeypatch.setattr(Progress, "advance", tamper)
    with pytest.raises((ManifestError, IntegrityError), match=shard):
        run_planned(source, plan, tmp_path / "out", jobs=1)
    assert done
    # The shard that was tampered with is not recorded; a worker may have done the next one when it was found out.
    journal = tmp_path / "out" / "reshard-journal.jsonl"
    assert not journal.exists() or f'"shard":"{shard}"' not in journal.read_text()
    assert journal.exists() is (tmp_path / "out").exists()


def test_a_failure_leaves_no_file_open(
    v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], fail_call: Callable[..., Any]
) -> None:
    before = os.listdir("/proc/self/fd")
    fail_call("pwrite", 30)
    with pytest.raises(ToolkitError):
        reshard_folder(v2_folder, tmp_path / "out")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_file_that_could_not_be_begun_is_not_begun_again(
    v2_folder: Path, tmp_path: Path, plan_of: Any, fail_call: Callable[..., Any]
) -> None:
    """By the other shard that has a part of it: it would only find that the file exists."""
    plan = plan_of(v2_folder)[1]
    with Progress(0, label="", quiet=True) as progress, ThreadPoolExecutor() as finisher:
        output = transfer_module._Output(plan.files[0], tmp_path, transfer_module.Durable(), finisher, progress)
        fail_call("pwrite", 1, errno.ENOSPC)
        for _ in range(2):
            with pytest.raises(ResourceError, match="no space left"):
                output.open()


def test_a_folder_that_could_not_be_written_is_forgotten_by_no_worker(
    v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it only to the first who asks; the others must not record what is in it."""
    real, asked = transfer_module.sync_folder, []

    def sync(folder: Path) -> None:
        asked.append(folder)
        if len(asked) == 1:
            time.sleep(0.3)  # the others are done meanwhile
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        real(folder)

    monkeypatch.setattr(transfer_module, "sync_folder", sync)
    with pytest.raises(ToolkitError, match="Input/output error"):
        reshard_folder(v2_folder, tmp_path / "out", jobs=3)
    assert len(asked) == 1
    assert not list(tmp_path.glob("out/*.jsonl"))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, int(sys.argv[1])))
from reshard.cli import reshard
reshard.main(sys.argv[2:], prog_name="reshard")
"""


@pytest.fixture
def sorted_by_dtype(tmp_path: Path) -> Path:
    """As the stock library writes: all scales before all weights, so 120 experts' files are open at once."""
    entries, position = [], 0
    for part, dtype, shape, size in (("weight_scale_inv", "F32", "[1,1]", 4), ("weight", "F8_E4M3", "[1,3]", 3)):
        for expert in range(120):
            name = f"model.layers.0.mlp.experts.{expert}.up_proj.{part}"
            entries.append(
                f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{position},{position + size}]}}'
            )
            position += size
    header = ("{" + ",".join(entries) + "}").encode()
    folder = tmp_path / "sorted"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(position))
    return folder


def test_more_open_files_than_a_shell_allows(sorted_by_dtype: Path, tmp_path: Path, tree: Tree) -> None:
    """The usual limit is 1024; four of Kimi-K2's shards need 1540 at once."""
    out = tmp_path / "new" / "out"
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, "2000", "run", sorted_by_dtype, out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, "120 files" in result.stdout) == (0, True), result.stderr
    shutil.rmtree(tmp_path / "new")
    before = tree(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, "48", "run", sorted_by_dtype, out], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (15, "", 1), result.stderr
    assert "too many files are open" in result.stderr
    assert tree(tmp_path) == before
