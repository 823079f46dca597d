"""A small web server for tests: files by ranges, what was asked of it, and wrong answers where a test wants them.

    with serve({"/a": b"content"}) as server:  # or a folder
        server.instead = once(lambda asked, right: right.cut(100), times=3)

It has many threads in this process, and keeps connections. More that can go wrong is in `tests.wrong_answers`.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep  # by name: tests take the module's away
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.served_files import find

CHUNK_BYTES = 1 << 16
"""What is sent at once, where there are pauses."""


@dataclass
class Asked:
    """One request, and what came of it.

    Attributes:
        path: With its slash in front.
        range: As it was sent.
        headers: Their names in lower case.
        span: The bytes of the file that the right answer has; None where that has none.
        status: What was answered; 0 before that, and where nothing was.
        sent: Bytes of the answer's body, counted before they go: who asked may be done before the server goes on.
    """

    path: str
    range: str | None
    headers: dict[str, str]
    span: tuple[int, int] | None = None
    status: int = 0
    sent: int = 0

    @property
    def name(self) -> str:
        """Of the file, relative to what is served."""
        return self.path.lstrip("/")


@dataclass
class Answer:
    """What is sent: status (0: nothing at all), headers, body; and whether the connection is reset behind it."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    declared: int | None = None
    """Content-Length, where it is not that of the body; the connection ends behind the body then."""
    reset: bool = False

    def cut(self, length: int, *, reset: bool = False) -> Answer:
        """So many bytes of it; then the connection ends."""
        return replace(self, body=self.body[:length], declared=len(self.body), reset=reset)


Fault = Callable[[Asked, Answer], Answer | None]
"""Is given a request and the right answer to it; what it gives back is sent, the right one for None."""


def no_fault(asked: Asked, right: Answer) -> None:
    """Nothing is wrong."""


class FileServer:
    """Files on a port of this machine.

    Attributes:
        files: What is served by path, with the slash in front.
        root: The folder that has the other files; None for none.
        url: Its address, without a slash at the end.
        asked: Every request so far, in order.
        instead: The fault, none at first. Many threads may be in it at once.
        etag: Gives the ETag of a file by its path; None for none. A folder's files have a Last-Modified too.
        delay_s: Before each answer.
        pause_s: Between CHUNK_BYTES of an answer.
        most_at_once: Requests under way at the same time.
    """

    def __init__(self, files: dict[str, bytes] | Path, *, tls: ssl.SSLContext | None = None) -> None:
        self.files = files if isinstance(files, dict) else {}
        self.root = files if isinstance(files, Path) else None
        self.url = ""
        self.asked: list[Asked] = []
        self.instead: Fault = no_fault
        self.etag: Callable[[str], str | None] = self._etag
        self.delay_s = self.pause_s = 0.0
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self._tls = tls
        self._port = 0
        self._server: _Server | None = None

    def start(self) -> None:
        """Serve, on the port that it had before if it had one."""
        server = self._server = _Server(self, self._port)
        if self._tls is not None:
            server.socket = self._tls.wrap_socket(server.socket, server_side=True)
        self._port = server.server_address[1]
        self.url = f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self._port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """End every connection; who connects is refused."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.end_connections()

    def forget(self) -> None:
        """Begin to count again."""
        with self.lock:
            self.asked, self.most_at_once = [], 0

    @property
    def ranges(self) -> list[str | None]:
        """The ranges of all requests as they were sent, in order."""
        return [asked.range for asked in self.asked]

    @property
    def spans(self) -> dict[str, list[tuple[int, int]]]:
        """What was answered of each file by name, as (begin, end), in order; whole files are one. 304 is not here."""
        found: dict[str, list[tuple[int, int]]] = {}
        for asked in self.asked:
            if asked.span is not None and asked.status in (200, 206):
                found.setdefault(asked.name, []).append(asked.span)
        return found

    def sent(self, suffix: str = "") -> int:
        """Bytes that were sent of files whose names end so."""
        return sum(asked.sent for asked in self.asked if asked.name.endswith(suffix))

    def _etag(self, path: str) -> str | None:
        file = find(path, self.files, self.root)
        return None if file is None else file.etag

    def right(self, asked: Asked) -> Answer:
        """The answer to a request; notes the bytes that it has."""
        file = find(asked.path, self.files, self.root)
        if file is None:
            return Answer(404)
        named = {"ETag": self.etag(asked.path), "Last-Modified": file.modified}
        headers = {"Accept-Ranges": "bytes"} | {key: value for key, value in named.items() if value is not None}
        if named["ETag"] is not None and asked.headers.get("if-none-match") == named["ETag"]:
            return Answer(304, headers)
        if asked.range is None:
            asked.span = (0, file.size)
            return Answer(200, headers, file.read(0, file.size))
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.range)
        if match is None:
            return Answer(400)
        begin, end = int(match[1]), min(int(match[2]) + 1, file.size)
        if begin >= file.size:
            return Answer(416, headers | {"Content-Range": f"bytes */{file.size}"})
        asked.span = (begin, end)
        headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{file.size}"}
        return Answer(206, headers, file.read(begin, end))


@contextmanager
def serve(files: dict[str, bytes] | Path, *, tls: ssl.SSLContext | None = None) -> Iterator[FileServer]:
    """Serve these files, or those of a folder, until the end of the block."""
    server = FileServer(files, tls=tls)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        served = self.server.served
        headers = {key.lower(): value for key, value in self.headers.items()}
        asked = Asked(unquote(urlsplit(self.path).path), headers.get("range"), headers)
        with served.lock:
            served.asked.append(asked)
            served.at_once += 1
            served.most_at_once = max(served.most_at_once, served.at_once)
        try:
            sleep(served.delay_s)
            right = served.right(asked)
            self._send(asked, served.instead(asked, right) or right)
        finally:
            with served.lock:
                served.at_once -= 1

    def _send(self, asked: Asked, answer: Answer) -> None:
        asked.sent, asked.status = len(answer.body), answer.status
        declared = len(answer.body) if answer.declared is None else answer.declared
        self.close_connection |= not answer.status or answer.reset or declared != len(answer.body)
        if answer.status:
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(declared))
            self.end_headers()
        for at in range(0, len(answer.body), CHUNK_BYTES):
            if at:
                sleep(self.server.served.pause_s)
            self.wfile.write(answer.body[at : at + CHUNK_BYTES])
        if answer.reset:
            # No polite end: what the other side reads next is an error.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, served: FileServer, port: int) -> None:
        self.served = served
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        pass  # a client that went away
