"""Bytes of files on web servers, by range: one file that stays what it is, read by any number of threads.

Failures that may pass (a broken connection, a busy server) are tried again, from the byte where they came; what cannot
get better by waiting is refused in one sentence. Credentials go to the server that they are for and to no other.
This file knows addresses and bytes; it must not know checkpoints. It needs the package urllib3.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from manifests import answers, patience, urls
from manifests.answers import ABSENT, EXPIRED, PassingError, explain, library, refuse
from manifests.errors import IntegrityError, ManifestError, RemoteError, SourceNotFoundError
from manifests.patience import Patience, Servers

if TYPE_CHECKING:
    import urllib3

READ_BYTES = 512 << 10
"""Asked of a connection at once: memory for more costs more than the calls that it saves."""

CONNECTIONS = 64
_REDIRECTS = 5
_IF_AGAIN = ", and if that ends alike, the servers behind this address do not agree on it"
_NO_RANGES = "the server does not serve ranges of files (it ignores Range); use one that does, such as nginx"
_logger = logging.getLogger(__name__)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What tells one state of a file on a server from another.

    Attributes:
        size: Its bytes.
        etag: What the server calls this state; None when it does not say.
        modified: When it was made, in the server's words; None when it does not say.
    """

    size: int
    etag: str | None
    modified: str | None

    @property
    def state(self) -> str | None:
        """The server's name of this state: the ETag, weakened or not, or else the time."""
        # A weak name is that of the same bytes, as far as the server knows: what packs on the way weakens it.
        return (self.etag or "").removeprefix("W/") or self.modified

    def differs(self, other: "Facts") -> bool:
        """Whether both cannot be the same state. Servers behind one address may agree in one of their words only."""
        if self.size != other.size:
            return True
        if self.etag and other.etag:
            return self.state != other.state
        return None not in (self.modified, other.modified) and self.modified != other.modified


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A small file that was read whole: its bytes and the server's name of its state."""

    content: bytes
    etag: str | None


class Web:
    """Connections to web servers, kept for the next request. Any number of threads may use one.

    Args:
        authorization: Of whom what is asked with: the value of the header by `urls.origin`.

    Raises:
        ToolkitError: The package urllib3 is not installed.
    """

    def __init__(self, authorization: Mapping[tuple[str, str, int], str] | None = None) -> None:
        self._library = library()
        self._authorization = dict(authorization or {})
        self._managers: dict[str | None, urllib3.PoolManager] = {}
        self._lock = threading.Lock()
        self.servers = Servers()
        """Which have answered so far."""
        self.requests = 0
        """Requests that were made so far."""

    def file(self, url: str) -> "RemoteFile":
        """A file that is read by ranges; nothing is asked yet."""
        return RemoteFile(self, url)

    def read(self, url: str, *, max_bytes: int, etag: str | None = None, tries: int | None = None) -> Document | None:
        """A small file whole; None when the server has none.

        Args:
            url: Its address.
            max_bytes: The most that it may have.
            etag: The state that is known already; then None says that it is still this one, and absence is an error.
            tries: Failures that are borne; fewer than TRIES where there is something else to go on with.

        Raises:
            SourceNotFoundError: There is none, and `etag` was given; or it must not be seen.
            ManifestError: It is larger.
            RemoteError: The server cannot be reached, or does not do what is asked.
        """
        borne = Patience(self.servers, url, tries)
        extra = {} if etag is None else {"If-None-Match": etag}
        while True:
            try:
                response = self.ask(url, extra)[0]
                with closing(response):
                    if response.status == 304 and etag is not None:
                        return None
                    if response.status in ABSENT and etag is None:
                        return None
                    refuse(response, url)
                    if response.status != 200:
                        raise RemoteError(f"{urls.shown(url)}: the server answers with status {response.status}")
                    return Document(content=_whole(response, url, max_bytes), etag=response.headers.get("ETag"))
            except PassingError as failure:
                borne.bear(failure)
            except self._library.exceptions.HTTPError as error:
                borne.bear(explain(error, url))

    def ask(
        self, url: str, headers: Mapping[str, str], where: str | None = None
    ) -> tuple["urllib3.BaseHTTPResponse", str]:
        """One GET, redirects followed: the response, its body not read, and the address that gave it.

        Args:
            url: The address.
            headers: To send with what is sent always.
            where: What the address is called in messages, where it was led to itself.

        Raises:
            RemoteError: A redirect leads nowhere, in circles, or off TLS.
            urllib3.exceptions.HTTPError: The connection failed.
        """
        at = url
        for _ in range(_REDIRECTS + 1):
            own = {"Accept-Encoding": "identity", "User-Agent": "expert-reshard", **headers}
            # Asked for each step: a redirect to another server takes no password there.
            if (authorization := self._authorization.get(urls.origin(at))) is not None:
                own["Authorization"] = authorization
            self.requests += 1
            response = self._manager(at).request(
                "GET", at, headers=own, preload_content=False, decode_content=False, redirect=False, retries=False
            )
            self.servers.answered(at)
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                return response, at
            response.close()
            at = _redirected(at, location, where or urls.shown(url))
        raise RemoteError(f"{where or urls.shown(url)}: is redirected more than {_REDIRECTS} times")

    def _manager(self, url: str) -> "urllib3.PoolManager":
        """The connections that lead there: by the proxy that the environment names, or direct."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
        with self._lock:
            if proxy not in self._managers:
                timeout = self._library.Timeout(connect=answers.CONNECT_S, read=answers.SILENCE_S)
                if proxy is None:
                    self._managers[proxy] = self._library.PoolManager(maxsize=CONNECTIONS, timeout=timeout)
                else:
                    way = urls.proxy_of(proxy)
                    own = {"Proxy-Authorization": way.authorization} if way.authorization else None
                    try:
                        self._managers[proxy] = self._library.ProxyManager(
                            way.url, maxsize=CONNECTIONS, timeout=timeout, proxy_headers=own
                        )
                    except self._library.exceptions.HTTPError as error:
                        says = "the proxy of the environment has an address that is no http"
                        raise RemoteError(f"{urls.shown(url)}: {says}") from error
            return self._managers[proxy]


class RemoteFile:
    """One file on a server, which must stay what it was when it was first seen.

    Args:
        web: Who asks.
        url: Its address.
        known: The state that it must have; the first one that is seen when not given.
    """

    def __init__(self, web: Web, url: str, known: Facts | None = None) -> None:
        self.web = web
        self.url = url
        self._facts = known
        self._lock = threading.Lock()
        # Where a redirect led: asked at once the next time, because the first server counts its requests.
        self._location = url

    @property
    def where(self) -> str:
        """Its address for messages."""
        return urls.shown(self.url)

    @property
    def facts(self) -> Facts:
        """Its state.

        Raises:
            See `read`.
        """
        if self._facts is None:
            self.begin(1)
        assert self._facts is not None
        return self._facts

    def begin(self, size: int) -> bytes:
        """The first bytes, all of them in a smaller file; asks for no more than these.

        Raises:
            See `read`.
        """
        stream = Stream(self, 0, size, clamp=True)
        with closing(stream):
            stream.open()
            content = bytearray(stream.end)
            stream.fill(memoryview(content))
        return bytes(content)

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from begin to end.

        Raises:
            SourceNotFoundError: There is no such file, or it must not be seen.
            IntegrityError: It changed on the server since it was first seen, or ends before the range does.
            RemoteError: The server cannot be reached, or does not do what is asked.
        """
        content = bytearray(end - begin)
        with closing(self.stream(begin, end)) as stream:
            stream.fill(memoryview(content))
        return bytes(content)

    def stream(self, begin: int, end: int) -> "Stream":
        """The bytes from begin to end, one behind the other; they are asked for when the first are read."""
        return Stream(self, begin, end)

    def forget_redirect(self) -> None:
        """Begin with the file's own address again: it may lead to another server than the one that failed."""
        self._location = self.url

    def ask(self, begin: int, end: int) -> "urllib3.BaseHTTPResponse":
        """The response with this range, or as much of it as the file has; its body not read.

        Raises:
            SourceNotFoundError, IntegrityError, RemoteError: See `read`.
            PassingError: A failure that may pass.
            urllib3.exceptions.HTTPError: The connection failed.
        """
        asked = self._location
        response, location = self.web.ask(asked, {"Range": f"bytes={begin}-{end - 1}"}, self.where)
        try:
            if asked != self.url and response.status in EXPIRED:
                # What a redirect leads to is often signed for a while only.
                raise PassingError("the redirected address is no longer valid", 0)
            self._location = location
            self._check(response, begin, end)
        except BaseException:
            response.close()
            raise
        return response

    def _check(self, response: "urllib3.BaseHTTPResponse", begin: int, end: int) -> None:
        """Whether a response is the range that was asked for, of the file that was seen before."""
        refuse(response, self.url)
        named = response.headers.get("Content-Range", "")
        is_empty = response.status == 200 and response.headers.get("Content-Length") == "0"
        if begin == 0 and (is_empty or (response.status == 416 and not named)):
            # Only an empty file has no first byte. Some servers send all of it, some do not say how much it is.
            named = "bytes */0"
        elif response.status == 200:
            named = ""
        found = _CONTENT_RANGE.fullmatch(named)
        if response.status == 200 and found is None:
            page = response.headers.get("Content-Type", "").lower().startswith("text/html")
            raise RemoteError(f"{self.where}: {answers.WEB_PAGE if page else _NO_RANGES}")
        if response.status not in (200, 206, 416) or (found is None and response.status == 206):
            raise RemoteError(f"{self.where}: the server answers a range with status {response.status} and no range")
        if found is None:
            raise IntegrityError(f"{self.where}: ends before byte {end}; it changed on the server or was cut")
        facts = Facts(
            size=int(found[3]), etag=response.headers.get("ETag"), modified=response.headers.get("Last-Modified")
        )
        with self._lock:
            known = self._facts = self._facts or facts
        if known.differs(facts):
            raise IntegrityError(f"{self.where}: changed on the server since it was first read; run again{_IF_AGAIN}")
        if response.status == 416 or not known.size:
            if begin < known.size:
                raise RemoteError(f"{self.where}: the server refuses bytes {begin} to {end} of {known.size}")
            return
        if (int(found[1] or -1), int(found[2] or -1) + 1) != (begin, min(end, known.size)):
            raise RemoteError(
                f"{self.where}: the server was asked for bytes {begin} to {end} and sends the range {named!r:.80}"
            )


class Stream:
    """A range of a remote file while it arrives; goes on by itself where a connection broke.

    Args:
        file: The file.
        begin: First byte.
        end: Behind the last byte.
        clamp: Whether the file may end before.

    Attributes:
        position: The byte that comes next.
        end: As given; what the file has when it was clamped.
    """

    def __init__(self, file: RemoteFile, begin: int, end: int, *, clamp: bool = False) -> None:
        self.position = begin
        self.end = end
        self._file = file
        self._clamp = clamp
        self._patience = Patience(file.web.servers, file.url)
        self._response: urllib3.BaseHTTPResponse | None = None

    def open(self) -> None:
        """Ask for the bytes, if that was not done; returns when the server has begun to answer."""
        self._retrying(self._connect)

    def fill(self, view: memoryview) -> None:
        """Put the next bytes into a buffer until it is full.

        Raises:
            See `RemoteFile.read`.
        """
        while view:
            view = view[self.readinto(view) :]

    def readinto(self, view: memoryview) -> int:
        """Put the next bytes into a buffer, as many as have arrived, at least one; 0 at the end.

        Raises:
            See `RemoteFile.read`.
        """
        wanted = min(len(view), self.end - self.position)
        if not wanted:
            return 0
        count = 0

        def receive() -> None:
            nonlocal count
            self._connect()
            assert self._response is not None
            # What has arrived and no more: bytes that a longer call holds would be lost with its connection.
            data = self._response.read1(min(wanted, READ_BYTES), decode_content=False)
            if not data:
                raise PassingError("the connection ended early")
            view[: len(data)] = data
            count = len(data)

        self._retrying(receive)
        self._patience.forget()
        self.position += count
        if self.position == self.end:
            self.close()
        return count

    def close(self) -> None:
        """Give the connection back, or end it when bytes are still on their way."""
        response, self._response = self._response, None
        if response is not None:
            if self.position < self.end:
                response.close()
            response.release_conn()

    def _connect(self) -> None:
        if self._response is None and self.position < self.end:
            self._response = self._file.ask(self.position, self.end)
            size = self._file.facts.size
            if self._clamp:
                self.end = min(self.end, size)
            elif self.end > size:
                raise IntegrityError(f"{self._file.where}: ends at byte {size}, before {self.end}")

    def _retrying(self, work: Callable[[], None]) -> None:
        errors = library().exceptions.HTTPError
        while True:
            try:
                return work()
            except PassingError as failure:
                passing = failure
            except errors as error:
                passing = explain(error, self._file.url)
            except BaseException:
                self._drop()
                raise
            self._drop()
            self._file.forget_redirect()
            self._patience.bear(passing)

    def _drop(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()


def _whole(response: "urllib3.BaseHTTPResponse", url: str, max_bytes: int) -> bytes:
    content, told = bytearray(), time.monotonic()
    while data := response.read1(READ_BYTES, decode_content=False):
        content += data
        if len(content) > max_bytes:
            raise ManifestError(f"{urls.shown(url)}: larger than {max_bytes} bytes, which no such file needs")
        if (now := time.monotonic()) - told >= patience.TOLD_PAUSE_S:
            told = now
            of_all = f" of {response.headers['Content-Length']}" if "Content-Length" in response.headers else ""
            _logger.warning("%s: %d%s bytes have come", urls.shown(url), len(content), of_all)
    return bytes(content)


def _redirected(at: str, location: str, where: str) -> str:
    """Where a redirect leads; `where` is who was asked at first, for messages: what is on the way may be secret."""
    nowhere = f"{where}: is redirected to an address that leads nowhere"
    try:
        # What is not ASCII in it is mostly UTF-8, which arrives here as Latin-1.
        target = urljoin(at, location.encode("latin-1").decode("utf-8", "replace"))
        scheme = urlsplit(target).scheme
    except ValueError as error:
        raise RemoteError(nowhere) from error
    if scheme not in ("http", "https"):
        raise RemoteError(f"{where}: is redirected to an address of {scheme!r:.20}, which is not followed")
    if urlsplit(at).scheme == "https" and scheme == "http":
        raise RemoteError(f"{where}: is redirected from https to http, which is not followed")
    try:
        # Not the password that a server writes into an address: nobody here gave it.
        return urls.parse(target).url
    except SourceNotFoundError as error:
        raise RemoteError(nowhere) from error
