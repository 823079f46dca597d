"""`check` reads sizes and headers: everything but payload damage is found, all of it at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests.check import check_files

EXPERT = "layers/2/experts/07.safetensors"


def test_an_undamaged_folder_has_no_problems(v3_resharded: Path, v3_folder: Path) -> None:
    assert check_files(manifests.open(v3_resharded)) == []
    assert check_files(manifests.open(v3_folder)) == []


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "gone": (EXPERT, lambda p: p.unlink(), "missing_file"),
    "cut": (EXPERT, lambda p: os.truncate(p, 5000), "invalid_file"),
    "cut inside the header": (EXPERT, lambda p: os.truncate(p, 5), "invalid_file"),
    "grown": (EXPERT, lambda p: os.truncate(p, p.stat().st_size + 1), "invalid_file"),
    "header changed": (EXPERT, lambda p: flip(p, 20), "invalid_file"),
    "header's padding changed": (EXPERT, lambda p: flip(p, 4095), "invalid_file"),
    "header's length changed": (EXPERT, lambda p: flip(p, 0), "invalid_file"),
    "a folder": (EXPERT, replace_by_folder, "missing_file"),
    "a FIFO": (EXPERT, replace_by_fifo, "missing_file"),
    "an auxiliary file gone": ("config.json", lambda p: p.unlink(), "missing_file"),
    "an auxiliary file cut": ("LICENSE", lambda p: os.truncate(p, 1), "invalid_file"),
    "an empty file that is a FIFO": ("empty.txt", replace_by_fifo, "missing_file"),
    "a saved header gone": ("source/headers/01.zst", lambda p: p.unlink(), "missing_file"),
    "a saved header cut": ("source/headers/01.zst", lambda p: os.truncate(p, 9), "invalid_file"),
}


@pytest.mark.parametrize(("path", "damage", "kind"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage(
    resharded_copy: Path,
    path: str,
    damage: Callable[[Path], Any],
    kind: str,
    deadline: None,
    program: Callable[..., Any],
) -> None:
    damage(resharded_copy / path)
    problems = check_files(manifests.open(resharded_copy))
    assert [(problem.loc, problem.kind) for problem in problems] == [(path, kind)]
    result = program("manifests", "check", resharded_copy)
    assert result.code == 13
    assert result.out.startswith(path)
    assert result.err == ""


def test_payload_is_not_read(resharded_copy: Path) -> None:
    flip(resharded_copy / EXPERT, 4096)
    assert check_files(manifests.open(resharded_copy)) == []


def test_all_problems_at_once(resharded_copy: Path) -> None:
    shutil.rmtree(resharded_copy / "layers")
    files = manifests.open(resharded_copy).manifest.files
    problems = check_files(manifests.open(resharded_copy))
    assert [problem.loc for problem in problems] == [file.path for file in files if file.layer is not None]
