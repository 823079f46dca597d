"""What servers, the Hub and users may write, at random: every answer is bytes that are right, or one of our sentences.

No sockets: answers are made here, behind urllib3's own classes. A case follows from its number alone; for more of them
than the tests take, call `find` with other numbers.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import huggingface_hub.constants
import pytest
import urllib3

from manifests import gguf_files, http, hub, patience, remote, urls
from manifests.errors import ToolkitError
from manifests.http import Web
from reshard.small_files import list_repository

CASES = 1500
CONTENT = Random(3).randbytes(3000)
SECRET = "s3cr3t"
MOST_REQUESTS = 60
"""Tries of one range, each with redirects: more would be without end."""

NUMBERS = ("0", "1", "9", "10", "999", "1000", "2999", "3000", "3001", "-1", "00", "1e3", "\u0663", "9" * 19)
NUMBERS += ("9" * 400, "9" * 5000)
PIECES = {
    "Content-Range": (*NUMBERS, "bytes ", "Bytes ", "items ", "bytes=", "-", "/", "*", " ", ",", "", "\x00", "\u00e9"),
    "Retry-After": (
        *NUMBERS, "Thu, ", "31 Feb ", "2026 ", "99999 ", "-5 ", "23:59:60 ", "GMT", "+9999", "Jan", "\u00b2", ":", "",
    ),
    "ETag": ('"', "W/", "x", "", "\u00ff", '"x"', "\x0b", "x" * 3000),
    "Last-Modified": ("Thu, 01 Jan 1970 00:00:00 GMT", "", "x", "\u00e9"),
    "Content-Encoding": ("gzip", "identity", "aws-chunked", ",", " ", "", "IDENTITY", "\u00e9"),
    "Content-Length": (*NUMBERS, ""),
    "Content-Type": ("text/html", "multipart/byteranges; boundary=x", "", ";"),
    "Location": (
        "http://", "https://", "//", "/", "..", ":", "@", "?", "#", "%", "%zz", "%2e%2e/", "host", "other", "[::1]",
        "[", "]", ":80", ":99999", ":x", f"u:{SECRET}@", f"?sig={SECRET}", "file:///etc/passwd", "javascript:", " ",
        "\t", "\u00e9", "\u00c3\u00a9", "\x00", "\\", "a" * 300, "xn--", ".", "\u2028",
    ),
}  # fmt: skip
REDIRECTS, BUSY = (301, 302, 303, 307, 308), (429, 503)
STATUSES = (
    200,
    206,
    206,
    206,
    204,
    300,
    304,
    400,
    401,
    403,
    404,
    407,
    410,
    412,
    416,
    500,
    501,
    520,
    599,
    *REDIRECTS,
    *BUSY,
)
BASES = {
    "Location": (f"http://other/a?sig={SECRET}", f"https://u:{SECRET}@host/b", "../c", "/\u00c3\u00a9"),
    "Retry-After": ("30", "Thu, 01 Jan 2037 00:00:00 GMT", "Thu, 31 Dec 1998 23:59:60 GMT"),
}


def mixed(chance: Random, pieces: tuple[str, ...]) -> str:
    return "".join(chance.choice(pieces) for _ in range(chance.randrange(7)))


def mutated(chance: Random, text: str, pieces: tuple[str, ...]) -> str:
    """A text with some places changed, or nothing of it."""
    if not text or chance.random() < 0.2:
        return mixed(chance, pieces)
    for _ in range(chance.randrange(4)):
        at, to = sorted((chance.randrange(len(text) + 1), chance.randrange(len(text) + 1)))
        to = chance.choice((at, min(at + 1, len(text)), to))
        text = text[:at] + chance.choice((*pieces, "")) + text[to:]
    return text


@dataclass
class Servers:
    """All servers there are: in place of a pool of connections.

    Attributes:
        answer: Gives status, headers and body for an address and the range that is asked of it.
        asked: Addresses, and whether a password went there.
    """

    answer: Callable[[str, tuple[int, int] | None], tuple[int, dict[str, str], bytes]]
    asked: list[tuple[str, bool]] = field(default_factory=list)

    def request(self, method: str, url: str, *, headers: dict[str, str], **_: Any) -> urllib3.HTTPResponse:
        """As `urllib3.PoolManager.request`."""
        assert method == "GET"
        self.asked.append((url, "Authorization" in headers))
        assert len(self.asked) < MOST_REQUESTS, "asks without end"
        # Where the library itself would refuse, here as there.
        urllib3.util.parse_url(url)
        begin, _, end = headers.get("Range", "").removeprefix("bytes=").partition("-")
        status, own, body = self.answer(url, (int(begin), int(end) + 1) if begin else None)
        return urllib3.HTTPResponse(
            io.BytesIO(body), headers=own, status=status, preload_content=False, decode_content=False
        )


def web_of(servers: Servers, authorization: dict[tuple[str, str, int], str] | None = None) -> Web:
    web = Web(authorization)
    web._manager = lambda url: servers  # type: ignore[method-assign, assignment, return-value]
    return web


def right(asked: tuple[int, int] | None) -> tuple[int, dict[str, str], bytes]:
    if asked is None:
        return 200, {"ETag": '"x"', "Content-Length": str(len(CONTENT))}, CONTENT
    begin, end = asked[0], min(asked[1], len(CONTENT))
    if begin >= end:
        return 416, {"Content-Range": f"bytes */{len(CONTENT)}"}, b""
    named = f"bytes {begin}-{end - 1}/{len(CONTENT)}"
    return 206, {"ETag": '"x"', "Content-Range": named, "Content-Length": str(end - begin)}, CONTENT[begin:end]


def ranges(chance: Random) -> None:
    """One file, read in some ranges from servers that answer wrong, redirect, or ask to wait."""
    wrong = chance.choice((0.1, 0.5, 1.0))

    def answer(url: str, asked: tuple[int, int] | None) -> tuple[int, dict[str, str], bytes]:
        status, headers, body = right(asked)
        if chance.random() < wrong:
            # Bytes stay those of the range that is named: what is sent in their place nobody could tell.
            for key in chance.sample(list(PIECES), chance.randrange(1, 4)):
                if chance.random() < 0.1:
                    headers.pop(key, None)
                else:
                    headers[key] = mutated(
                        chance, headers.get(key) or chance.choice(BASES.get(key, ("",))), PIECES[key]
                    )
            named, own = (of.get("Content-Range", "").partition("/")[0] for of in (headers, right(asked)[1]))
            if re.findall("[1-9][0-9]*|0(?![0-9])", named) != re.findall("[0-9]+", own):
                body = body[1:]
            status = chance.choice((status, status, chance.choice(STATUSES)))
            if "Location" in headers or "Retry-After" in headers:
                status = chance.choice(REDIRECTS if "Location" in headers else BUSY)
            body = body[: chance.choice((len(body), len(body), 0, 7))]
        return status, headers, body

    servers = Servers(answer)
    url = f"http{chance.choice(('', 's'))}://host/a?sig={SECRET}"
    file = web_of(servers, {urls.origin(url): SECRET}).file(url)
    for _ in range(3):
        servers.asked.clear()
        begin = chance.choice((0, 0, 1, 1000, 2999))
        end = begin + chance.choice((1, 10, 2000))
        is_begin = begin == 0 and chance.random() < 0.5
        try:
            found = file.begin(end) if is_begin else file.read(begin, end)
        except ToolkitError as error:
            check(error)
        else:
            # Of a file that is shorter, all of it.
            assert len(found) == end - begin or (is_begin and len(found) < end)
            assert CONTENT[begin:].startswith(found), "other bytes than were asked for"
        for asked, told in servers.asked:
            assert not told or urls.origin(asked) == urls.origin(url), "a password went elsewhere"
            assert asked.startswith(("http://", "https://"))
            assert urlsplit(asked)._replace(netloc="").geturl().isascii(), "an address that cannot be sent"
            assert "@" not in urlsplit(asked).netloc


def documents(chance: Random) -> None:
    """A small file from the same servers."""
    servers = Servers(lambda url, asked: (
        chance.choice(STATUSES),
        {key: mixed(chance, PIECES[key]) for key in chance.sample(list(PIECES), 3)},
        CONTENT[: chance.choice((0, 10, len(CONTENT)))],
    ))  # fmt: skip
    url = f"http://host/a?sig={SECRET}"
    try:
        found = web_of(servers).read(url, max_bytes=100, etag=chance.choice((None, '"x"')))
    except ToolkitError as error:
        check(error)
    else:
        assert found is None or len(found.content) <= 100


ADDRESS = f"https://user:{SECRET}@host.example:8080/models/V3%20x/?sig={SECRET}#part"


def no_hub(*_: object, **__: object) -> None:
    raise OSError("nobody is there")


def addresses(chance: Random) -> None:
    """What a user may give as an address."""
    text = mutated(chance, chance.choice((ADDRESS, "http://host/a", "hf://org/name@main/a")), PIECES["Location"])
    if not urls.is_url(text):
        return
    servers = Servers(lambda url, asked: (404, {}, b""))
    # Only where a password or a signature is: one that lost its sign is part of a name.
    hidden = SECRET not in re.split("[?#]", re.sub("^[a-z]+://[^/?#@]*@", "", text))[0]
    try:
        assert not hidden or SECRET not in urls.shown(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface_hub.HfApi, "model_info", no_hub)
            folder, file = remote.find(text)
        folder.web = web_of(servers)
        assert folder.read("config.json", max_bytes=100) is None
        assert folder.size("a b/\u00e9#?.json") is None
        _ = gguf_files.read_file(folder, file) if file else remote.read_shards(folder)
    except ToolkitError as error:
        check(error, is_secret=hidden)
    for asked, _ in servers.asked:
        assert urlsplit(asked)._replace(netloc="").geturl().isascii()  # a host may be of any letters
        assert asked.isprintable()
        assert "@" not in urlsplit(asked).netloc


NAMES = (
    "model-00001-of-00002.safetensors", "a/b.safetensors", "../x.safetensors", "/etc/passwd", "a//b", "a\\b", ".", "A",
    "..", "http://other/x.safetensors", "a?b=c", "a#b", "%2e%2e/x", "a\x00b", "\u202e", "con", "a:b", "", "x" * 2000,
    "a", "layers/x", "source/x", ".git/x", "model.safetensors.index.json", "manifest.json", "\ud800",
    "a b.safetensors",
)  # fmt: skip


def indexes(chance: Random) -> None:
    """Names that an index on a server has: nothing beside its folder is asked for."""
    weight_map: dict[str, Any] = {
        f"model.layers.{n}.x.weight": mutated(chance, chance.choice(NAMES), NAMES)
        for n in range(chance.randrange(1, 4))
    }
    raw = json.dumps(
        {"weight_map": chance.choice((weight_map, weight_map, weight_map, list(weight_map), None))}
    ).encode()
    raw = raw[: chance.choice((len(raw), len(raw), len(raw) // 2))]
    empty = (2).to_bytes(8, "little") + b"{}"

    def answer(url: str, asked: tuple[int, int] | None) -> tuple[int, dict[str, str], bytes]:
        if url.endswith("/model.safetensors.index.json"):
            return 200, {}, raw
        if asked is None:
            return 404, {}, b""
        return 206, {"Content-Range": f"bytes 0-{len(empty) - 1}/{len(empty)}"}, empty

    servers = Servers(answer)
    folder = remote.RemoteFolder(web_of(servers), f"http://host/models/v3?sig={SECRET}")
    try:
        remote.read_shards(folder)
    except ToolkitError as error:
        check(error)
    for asked, _ in servers.asked:
        parts = urlsplit(asked)
        assert (parts.scheme, parts.netloc, parts.query) == ("http", "host", f"sig={SECRET}")
        assert parts.path.startswith("/models/v3/")
        # As the library sends it: dots are gone by then.
        assert (urllib3.util.parse_url(asked).path or "").startswith("/models/v3/")


def listings(chance: Random) -> None:
    """What the Hub may say of a repository."""
    sizes = (None, 0, 7, -1, 2**70)
    digests = (None, "0" * 64, "x", "")
    siblings = [
        SimpleNamespace(
            rfilename=mutated(chance, chance.choice(NAMES), NAMES),
            size=chance.choice(sizes),
            lfs=chance.choice((None, SimpleNamespace(sha256=chance.choice(digests)))),
        )
        for _ in range(chance.randrange(5))
    ]
    info = SimpleNamespace(sha=chance.choice(("0" * 40, "main")), siblings=chance.choice((siblings, siblings, None)))
    servers = Servers(lambda url, asked: (404, {}, b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.example")
        patch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
        patch.setattr(huggingface_hub, "get_token", lambda: SECRET)
        try:
            found = hub.resolve(f"hf://org/name{chance.choice(('', '@main', '/a'))}")
        except ToolkitError as error:
            check(error)
            return
    folder = remote.RemoteFolder(web_of(servers), found.url, name=found.name, files=found.files)
    for ask in (
        lambda: list_repository(folder, {name: listed.size for name, listed in found.files.items()}, {}),
        lambda: [folder.size(name) for name in found.files],
        lambda: [folder.read(name, max_bytes=10) for name in found.files],
    ):
        try:
            ask()
        except ToolkitError as error:
            check(error)
    for asked, _ in servers.asked:
        assert asked.startswith("https://hub.example/org/name/resolve/")
        assert (urllib3.util.parse_url(asked).path or "").startswith("/org/name/resolve/")


def check(error: ToolkitError, *, is_secret: bool = True) -> None:
    text = str(error)
    assert text.strip(), "an empty message"
    assert len(text) < 12_000
    text.encode("utf-8")
    assert not is_secret or SECRET not in text, "a secret in a message"


TARGETS = (ranges, documents, addresses, indexes, listings)


def find(target: Callable[[Random], None], numbers: range) -> Iterator[str]:
    """What is wrong, a line each."""
    with pytest.MonkeyPatch.context() as patch:
        waited: list[float] = []
        patch.setattr(http.time, "sleep", waited.append)
        for number in numbers:
            try:
                target(Random(f"{target.__name__} {number}"))
            except Exception as error:
                yield f"{target.__name__} {number}: {type(error).__name__}: {error}"
        assert all(0 <= seconds <= patience.LONGEST_PAUSE_S for seconds in waited)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_nothing_is_found(target: Callable[[Random], None]) -> None:
    assert list(itertools.islice(find(target, range(CASES)), 5)) == []
