"""Resharding from nginx: a server that others wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.nginx import needs_nginx, nginx


@needs_nginx
def test_the_result_is_that_of_a_local_copy(
    v3_copy: Path, tmp_path: Path, program: Any, tree: Any, reshard_folder: Any
) -> None:
    (v3_copy / "empty.txt").unlink()
    shutil.rmtree(v3_copy / "figures")
    expected = tree(reshard_folder(v3_copy, tmp_path / "local"))
    with nginx(v3_copy, tmp_path / "nginx") as url:
        ran = program("reshard", "run", url, tmp_path / "out")
        assert ran.code == 0, ran.err
        assert tree(tmp_path / "out") == expected
        damaged = next((tmp_path / "out").glob("layers/1/experts/*.safetensors"))
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        assert program("reshard", "repair", tmp_path / "out", "--from", url).code == 0
        assert tree(tmp_path / "out") == expected
        assert program("reshard", "verify", tmp_path / "out", "--against", url).code == 0
