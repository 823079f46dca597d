"""A small web server for tests: serves bytes with ranges, and does wrong what a test asks it to."""

from __future__ import annotations

import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Asked:
    """One request: its path, its range as sent, its headers in lower case."""

    path: str
    range: str | None
    headers: dict[str, str]


@dataclass
class Answer:
    """What is sent: status, headers, body; and then whether the connection is reset."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    declared: int | None = None
    """Content-Length, where it is not that of the body."""
    reset: bool = False


@dataclass
class FileServer:
    """The server: files by path, what was asked so far, and what to do instead of the right thing."""

    files: dict[str, bytes]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    sent_bytes: int = 0
    instead: Callable[[Asked, Answer], Answer | None] = lambda asked, right: None
    """Is given a request and the right answer to it; what it gives back is sent, the right one for None."""

    def etag(self, path: str) -> str:
        return f'"{len(self.files[path])}-{hash(self.files[path])}"'

    def right(self, asked: Asked) -> Answer:
        content = self.files.get(asked.path)
        if content is None:
            return Answer(404)
        headers = {"ETag": self.etag(asked.path), "Accept-Ranges": "bytes"}
        if asked.headers.get("if-none-match") == headers["ETag"]:
            return Answer(304, headers)
        if asked.range is None:
            return Answer(200, headers, content)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.range)
        assert match, asked.range
        begin, end = int(match[1]), min(int(match[2]) + 1, len(content))
        if begin >= len(content):
            return Answer(416, headers | {"Content-Range": f"bytes */{len(content)}"})
        return Answer(206, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}, content[begin:end])

    @property
    def ranges(self) -> list[str | None]:
        """The ranges that were asked for, in order."""
        return [asked.range for asked in self.asked]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    served: FileServer

    def do_GET(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        asked = Asked(unquote(urlsplit(self.path).path), headers.get("range"), headers)
        self.served.asked.append(asked)
        right = self.served.right(asked)
        answer = self.served.instead(asked, right) or right
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        declared = len(answer.body) if answer.declared is None else answer.declared
        self.send_header("Content-Length", str(declared))
        self.end_headers()
        # Before it is sent: who asked may be done before this goes on.
        self.served.sent_bytes += len(answer.body)
        self.wfile.write(answer.body)
        if answer.reset:
            # No polite end: what the other side reads next is an error.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if answer.reset or declared != len(answer.body):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        pass  # a client that went away


@contextmanager
def serve(files: dict[str, bytes], *, tls: ssl.SSLContext | None = None) -> Iterator[FileServer]:
    """Serve these files on a port of this machine until the end of the block."""
    served = FileServer(files)
    handler = type("Handler", (_Handler,), {"served": served})
    with _Server(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        served.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
