"""A web server of a folder with byte ranges, that counts what it sends and fails as it is told.

For tests alone: many threads in this process, HTTP/1.1 with kept connections.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(slots=True)
class Sent:
    """What was sent of files: every range with its bytes, bodies alone."""

    ranges: list[tuple[str, int, int]] = field(default_factory=list)

    def bytes(self, suffix: str = "") -> int:
        """Bytes of files whose names end so."""
        return sum(end - begin for name, begin, end in self.ranges if name.endswith(suffix))

    def of(self, name: str) -> list[tuple[int, int]]:
        """Ranges of one file, sorted."""
        return sorted((begin, end) for other, begin, end in self.ranges if other == name)


class RangeServer:
    """A folder on a server of its own.

    Attributes:
        root: The folder.
        sent: What was sent.
        fault: Asked before each answer with the file's name and the range, None without one; what it returns is
            answered: a status, a status with headers, ``"cut"`` (half of the bytes, then the connection ends),
            ``"drop"`` (nothing at all), or None for the file.
        change: Changes bytes of an answer: name, first byte, bytes.
        etag: Gives the ETag of a file.
        delay_s: Before each answer.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sent = Sent()
        self.lock = threading.Lock()
        self.fault: Callable[[str, tuple[int, int] | None], Any] = lambda *_: None
        self.change: Callable[[str, int, bytes], bytes] = lambda _, __, data: data
        self.etag: Callable[[Path], str | None] = lambda path: f'"{path.stat().st_mtime_ns:x}-{path.stat().st_size:x}"'
        self.delay_s = 0.0
        self.published: Callable[[Path], str] = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Serve, on the port that it had before if it had one."""
        handler = type("Handler", (_Handler,), {"owner": self})
        server = self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """End every connection; who connects is refused."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.end_connections()

    def reset(self) -> None:
        """Forget what was sent."""
        self.sent = Sent()


@contextmanager
def serving(root: Path) -> Iterator[RangeServer]:
    """A server of a folder."""
    server = RangeServer(root)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def end_connections(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of our business."""


class _Handler(BaseHTTPRequestHandler):
    owner: RangeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_request(self, *args: Any) -> None:
        """Silence."""

    log_error = log_request

    def do_GET(self) -> None:
        owner = self.owner
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self._list()
            return
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}").lstrip("/")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        asked = (int(wanted[1]), int(wanted[2]) + 1) if wanted else None
        time.sleep(owner.delay_s)
        with owner.lock:
            fault = owner.fault(name, asked)
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, int):
            fault = (fault, {})
        if isinstance(fault, tuple):
            self._answer(fault[0], fault[1], b"")
            return
        file = owner.root / name
        if not file.is_file():
            self._answer(404, {}, b"none")
            return
        self._send(name, file, asked, is_cut=fault == "cut")

    def _send(self, name: str, file: Path, asked: tuple[int, int] | None, *, is_cut: bool) -> None:
        size, etag = file.stat().st_size, self.owner.etag(file)
        headers = {"Accept-Ranges": "bytes"} | ({} if etag is None else {"ETag": etag})
        if asked is not None and asked[0] >= size:
            self._answer(416, headers | {"Content-Range": f"bytes */{size}"}, b"")
            return
        begin, end = (0, size) if asked is None else (asked[0], min(asked[1], size))
        with file.open("rb") as opened:
            opened.seek(begin)
            data = self.owner.change(name, begin, opened.read(end - begin))
        status = 200
        if asked is not None:
            status, headers = 206, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}
        if is_cut:
            data, whole = data[: len(data) // 2], len(data)
            headers |= {"Content-Length": str(whole)}
        with self.owner.lock:
            self.owner.sent.ranges.append((name, begin, begin + len(data)))
        self._answer(status, headers, data)
        self.close_connection |= is_cut

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _list(self) -> None:
        """As the Hub tells what a repository holds."""
        siblings = []
        for file in sorted(self.owner.root.rglob("*")):
            if file.is_file():
                name, size = file.relative_to(self.owner.root).as_posix(), file.stat().st_size
                large = {"sha256": self.owner.published(file), "size": size, "pointerSize": 134}
                siblings.append({"rfilename": name, "size": size, "blobId": "0" * 40})
                siblings[-1] |= {"lfs": large} if name.endswith(".safetensors") else {}
        body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "private": False}).encode()
        self._answer(200, {"Content-Type": "application/json"}, body)
