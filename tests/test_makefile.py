"""The Makefile's own rules, apart from what its programs do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GIVEN = ("MODEL", "OUT", "PROMPT", "TOKENS")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a folder with nothing but the Makefile and what a test puts there."""
    shutil.copy(ROOT / "Makefile", folder)
    # Not as a part of the make that may run the tests, with its flags and variables.
    own = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS")) and key not in GIVEN
    }
    return subprocess.run(["make", *arguments], cwd=folder, env=own, capture_output=True, text=True, check=False)


def test_clean_leaves_no_compiled_library(tmp_path: Path) -> None:
    (tmp_path / "runner").mkdir()
    for name in ("_native.cpython-311-x86_64-linux-gnu.so", "native.py"):
        (tmp_path / "runner" / name).touch()
    assert make(tmp_path, "clean").returncode == 0
    assert [path.name for path in (tmp_path / "runner").iterdir()] == ["native.py"]


def test_an_empty_model_is_not_the_embedded_one(tmp_path: Path) -> None:
    for empty in ("MODEL=", "MODEL= "):
        done = make(tmp_path, "-n", "run-inference", empty)
        assert done.returncode == 2
        assert "MODEL is empty: give the folder of a checkpoint, or leave MODEL out" in done.stderr
    for given in ([], ["MODEL=x"]):
        assert "is empty" not in make(tmp_path, "-n", "run-inference", *given).stderr


def test_an_address_is_run_where_it_is(tmp_path: Path) -> None:
    """What would be called, with programs that say what they were given."""
    (tmp_path / "bin").mkdir()
    for name in ("reshard", "manifests", "runner"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $1 $2 $3"\n')
        program.chmod(0o755)
    (tmp_path / ".base").touch()
    url = "https://host/model"

    def called(*arguments: str) -> list[str]:
        done = make(tmp_path, "run-inference", f"VENV={tmp_path}", "-o", f"{tmp_path}/.base", "PROMPT=", *arguments)
        assert done.returncode == 0, done.stderr
        return [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]

    assert called(f"MODEL={url}/") == [f"manifests show {url}", f"runner generate -m {url}"]
    resharded = ["reshard run {0} {1}", "manifests show {1}", "runner generate -m {1}"]
    assert called(f"MODEL={url}", "OUT=x") == [line.format(url, "x") for line in resharded]
    assert called("MODEL=folder") == [line.format("folder", "folder-experts") for line in resharded]
