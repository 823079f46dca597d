"""A web server that serves a folder by ranges, counts what is asked of it, and fails on order; and an nginx."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NGINX = Path("/usr/sbin/nginx")


class FolderServer:
    """Serves a folder on a free port of this machine.

    Attributes:
        url: Its address, without a slash at the end.
        ranges: Every range that was asked for of each file, as (begin, end), in order; whole files count as one.
        statuses: How often each status was answered.
        corrupt: By path: the byte that is sent flipped, and how many more times.
        cut: By path: bytes behind which the connection ends, and how many more times.
        refuse: By path: the status that is answered, and how many more times.
        delay_s: Before each answer.
        chunk_pause_s: Between 64 KiB of an answer.
        ignore_ranges: Answer with whole files.
        with_etag: Name states by ETag, of size and time; without it only Last-Modified tells.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ranges: dict[str, list[tuple[int, int]]] = {}
        self.statuses: Counter[int] = Counter()
        self.corrupt: dict[str, tuple[int, int]] = {}
        self.cut: dict[str, tuple[int, int]] = {}
        self.refuse: dict[str, tuple[int, int]] = {}
        self.delay_s = 0.0
        self.chunk_pause_s = 0.0
        self.ignore_ranges = False
        self.with_etag = True
        self.lock = threading.Lock()
        self.at_once = 0
        self.most_at_once = 0
        outer = self

        class Handler(_Handler):
            server_of = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop; whoever asks is refused from then on."""
        self._server.shutdown()
        self._server.server_close()

    def forget(self) -> None:
        """Begin to count again."""
        with self.lock:
            self.ranges, self.statuses = {}, Counter()
            self.most_at_once = 0

    def sent(self, suffix: str = "") -> int:
        """Bytes of files whose names end so that were asked for."""
        with self.lock:
            found = [pairs for path, pairs in self.ranges.items() if path.endswith(suffix)]
        return sum(end - begin for pairs in found for begin, end in pairs)

    def take(self, orders: dict[str, tuple[int, int]], path: str) -> int | None:
        """What was ordered for a file, one time less from now on; None when nothing."""
        with self.lock:
            value, times = orders.get(path, (0, 0))
            if times <= 0:
                return None
            orders[path] = (value, times - 1)
            return value


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is nothing to talk about."""


class _Handler(BaseHTTPRequestHandler):
    server_of: FolderServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.server_of
        with owner.lock:
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
        try:
            self._answer(owner)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with owner.lock:
                owner.at_once -= 1

    def _answer(self, owner: FolderServer) -> None:
        time.sleep(owner.delay_s)
        name = unquote(urlsplit(self.path).path).lstrip("/")
        path = owner.root / name
        if (status := owner.take(owner.refuse, name)) is not None:
            self._status(status)
            return
        if not path.is_file():
            self._status(404)
            return
        found = path.stat()
        etag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"' if owner.with_etag else None
        if etag is not None and self.headers.get("If-None-Match") == etag:
            self._status(304, etag=etag)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = 0, found.st_size
        if asked is not None and not owner.ignore_ranges:
            begin, end = int(asked[1]), min(int(asked[2]) + 1, found.st_size)
            if begin >= found.st_size:
                self._status(416, total=found.st_size)
                return
        with owner.lock:
            owner.statuses[206 if asked else 200] += 1
            owner.ranges.setdefault(name, []).append((begin, end))
        self.send_response(206 if asked is not None and not owner.ignore_ranges else 200)
        self.send_header("Content-Length", str(end - begin))
        if asked is not None and not owner.ignore_ranges:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{found.st_size}")
        self.send_header("Last-Modified", formatdate(found.st_mtime, usegmt=True))
        if etag is not None:
            self.send_header("ETag", etag)
        self.end_headers()
        self._body(owner, name, path, begin, end)

    def _body(self, owner: FolderServer, name: str, path: Path, begin: int, end: int) -> None:
        with path.open("rb") as file:
            file.seek(begin)
            data = bytearray(file.read(end - begin))
        flipped = owner.corrupt.get(name)
        if flipped is not None and begin <= flipped[0] < end and owner.take(owner.corrupt, name) is not None:
            data[flipped[0] - begin] ^= 1
        if (length := owner.take(owner.cut, name)) is not None:
            self.wfile.write(data[:length])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        for at in range(0, len(data), 1 << 16):
            if at and owner.chunk_pause_s:
                time.sleep(owner.chunk_pause_s)
            self.wfile.write(data[at : at + (1 << 16)])

    def _status(self, status: int, *, total: int | None = None, etag: str | None = None) -> None:
        with self.server_of.lock:
            self.server_of.statuses[status] += 1
        self.send_response(status)
        if total is not None:
            self.send_header("Content-Range", f"bytes */{total}")
        if etag is not None:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serving(root: Path) -> Iterator[FolderServer]:
    """A server of a folder that is gone behind the block."""
    server = FolderServer(root)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def nginx(root: Path, work: Path, *, extra: str = "") -> Iterator[str]:
    """The address of an nginx of our own that serves a folder; needs NGINX.

    Args:
        root: The folder.
        work: Where its own files go.
        extra: More lines of its configuration, such as ``limit_rate 1m;``.
    """
    work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = "".join(
        f"{name}_temp_path {work / name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (work / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {work / 'pid'}; error_log {work / 'error.log'};\n"
        "events { worker_connections 256; }\n"
        f"http {{ access_log off; sendfile on; {names}\n"
        f"server {{ listen 127.0.0.1:{port}; root {root}; {extra} }} }}\n"
    )
    command = [str(NGINX), "-p", str(work), "-c", str(work / "nginx.conf"), "-e", str(work / "error.log")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def memory_folder() -> str | None:
    """A folder in memory, where nobody waits for a busy disk; None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
