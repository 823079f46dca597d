"""An nginx of our own, for tests: a web server that others wrote."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

CONFIG = """
{user} daemon off; master_process off; pid {work}/pid; error_log {work}/error.log; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; default_type application/octet-stream;
  client_body_temp_path {work}/t; proxy_temp_path {work}/t; fastcgi_temp_path {work}/t;
  uwsgi_temp_path {work}/t; scgi_temp_path {work}/t;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@contextmanager
def nginx(root: Path, work: Path) -> Iterator[str]:
    """Serve a folder; gives its address.

    Args:
        root: The folder.
        work: Where its own files go.
    """
    assert NGINX is not None
    work.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Started by root, it would be another user, who may not look into the folders of tests.
    user = "user root;" if os.geteuid() == 0 else ""
    (work / "conf").write_text(CONFIG.format(user=user, work=work, port=port, root=root))
    command = [NGINX, "-c", f"{work}/conf", "-p", str(work), "-e", f"{work}/error.log"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(200):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            else:
                pytest.fail("nginx does not answer")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
