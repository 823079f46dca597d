"""Resharding from nginx: a server that others wrote."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NGINX = shutil.which("nginx") or ("/usr/sbin/nginx" if Path("/usr/sbin/nginx").exists() else None)
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

CONFIG = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log {folder}/access.log; sendfile on; default_type application/octet-stream;
  client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t;
  uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Serve a folder; return its address."""
    running: list[subprocess.Popen[bytes]] = []

    def serve(root: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = tmp_path / f"nginx-{port}"
        folder.mkdir()
        # Its workers may be another user, who may not look into pytest's folders.
        served = folder / "root"
        served.symlink_to(root)
        (folder / "conf").write_text("user root;" + CONFIG.format(folder=folder, port=port, root=served))
        assert NGINX is not None
        running.append(subprocess.Popen([NGINX, "-c", folder / "conf", "-p", folder], stderr=subprocess.DEVNULL))
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}"
            time.sleep(0.02)
        pytest.fail("nginx does not answer")

    yield serve
    for process in running:
        process.terminate()
        process.wait(10)


def test_the_result_is_that_of_a_local_copy(
    nginx: Callable[[Path], str], v3_copy: Path, tmp_path: Path, program: Any, tree: Any, reshard_folder: Any
) -> None:
    (v3_copy / "empty.txt").unlink()
    shutil.rmtree(v3_copy / "figures")
    expected = tree(reshard_folder(v3_copy, tmp_path / "local"))
    url = nginx(v3_copy)
    ran = program("reshard", "run", url, tmp_path / "out")
    assert ran.code == 0, ran.err
    assert tree(tmp_path / "out") == expected
    damaged = next((tmp_path / "out").glob("layers/1/experts/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert program("reshard", "repair", tmp_path / "out", "--from", url).code == 0
    assert tree(tmp_path / "out") == expected
    assert program("reshard", "verify", tmp_path / "out", "--against", url).code == 0
