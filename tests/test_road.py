"""The whole road through the programs, on the embedded model: shards in, text out, and back to the shards."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner import demo

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program, *rest = map(str, arguments)
    # One thread: the machine may be busy, and tiny products gain nothing.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", program, *rest], capture_output=True, text=True, check=False, env=environment
    )


def sha256_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_from_shards_to_text_and_back(tmp_path: Path) -> None:
    source, experts, back = demo.path(), tmp_path / "experts", tmp_path / "back"
    before = sha256_of(source)

    done = run("reshard", "run", source, experts)
    assert done.returncode == 0, done.stderr
    # 4 layers' dense parts and the MTP layer's, embedding and head twice, 4 x 64 experts.
    assert "265 files" in done.stdout

    shown = run("manifests", "show", experts, "--json")
    assert shown.returncode == 0, shown.stderr
    summary = json.loads(shown.stdout)
    assert summary["files"] == 265
    assert summary["unknown"] == []
    assert [layer["experts"] for layer in summary["layers"]] == [0, 64, 64, 64, 64]
    assert run("manifests", "check", experts).returncode == 0

    told = run("runner", "generate", "-m", experts, "-p", "import ", "-n", "8", "--temp", "0")
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip()
    assert "of experts were in memory" in told.stderr
    # Straight from the shards: the same bytes, so the same text.
    assert run("runner", "generate", "-p", "import ", "-n", "8", "--temp", "0").stdout == told.stdout

    assert run("reshard", "verify", experts, "--against", source).returncode == 0
    checked = run("reshard", "restore", experts, "--check")
    assert checked.returncode == 0, checked.stderr
    assert "all 163 source shards" in checked.stdout
    assert run("reshard", "restore", experts, back).returncode == 0
    assert sha256_of(back) == before == sha256_of(source)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_run_inference_reshards_once_and_never_mixes_models(tmp_path: Path) -> None:
    source, out = shutil.copytree(demo.path(), tmp_path / "model"), tmp_path / "model-experts"
    bin_folder = Path(sys.executable).parent

    def make() -> subprocess.CompletedProcess[str]:
        # -o: what is installed here is taken as it is.
        return subprocess.run(
            ["make", "-o", ".venv/.base", f"BIN={bin_folder}", "run-inference", f"MODEL={source}", "TOKENS=1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    first = make()
    assert first.returncode == 0, first.stderr
    assert f"{out}: 265 files" in first.stdout
    assert "def read_lines(path" in first.stdout
    again = make()
    assert again.returncode == 0, again.stderr
    assert "all of it was there already" in again.stdout
    config = source / "config.json"
    before = config.read_bytes()
    config.write_bytes(before + b"\n")
    stale = make()
    assert stale.returncode != 0
    assert f"{config}: differs from what {out} was made with; put the file back as it was" in stale.stderr
    assert "def read_lines" not in stale.stdout
    config.write_bytes(before)
    shard = source / "model-00001-of-000163.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    mixed = make()
    assert mixed.returncode != 0
    assert "holds another model than" in mixed.stderr
    assert "def read_lines" not in mixed.stdout
