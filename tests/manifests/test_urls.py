"""Addresses: which texts are one, how names are put behind them, and that no message shows a password."""

from __future__ import annotations

import base64

import pytest

from manifests import urls
from manifests.errors import SourceNotFoundError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://host/a", True),
        ("HTTPS://host", True),
        ("hf://org/name", True),
        ("ftp://host/a", True),
        ("file:///a", True),
        ("folder/http:", False),
        ("C:/models", False),
        ("http:/host", False),
        ("./http://x", False),
        ("", False),
    ],
)
def test_what_is_an_address(text: str, expected: bool) -> None:
    assert urls.is_url(text) is expected


def test_parsed() -> None:
    assert urls.parse("https://host/a/b") == urls.Address(url="https://host/a/b")
    assert urls.parse("HTTP://host:81/a?sig=x#part").url == "http://host:81/a?sig=x"
    # RFC 7617's own example.
    found = urls.parse("https://Aladdin:open%20sesame@host/a")
    assert found == urls.Address(url="https://host/a", authorization="Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==")
    assert urls.parse("http://h/a b/%C3%A9/é").url == "http://h/a%20b/%C3%A9/%C3%A9"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file:///models/v3", "file:///models/v3: cannot be read; give the path itself"),
        ("ftp://host/a", "http, https and hf addresses are read"),
        ("http://", "http, https and hf addresses are read"),
        ("http://user:secret@/a", "http, https and hf addresses are read"),
        ("http://host:port/a", "http, https and hf addresses are read"),
        ("http://host:99999/a", "http, https and hf addresses are read"),
        ("http://host/a\nHost: other", "http, https and hf addresses are read"),
        ("http://[::1/a", "http, https and hf addresses are read"),
        ("javascript://host/a", "http, https and hf addresses are read"),
        ("http://user:secret@host:port/a", "http://...: cannot be read"),
        ("http://user:pa/secret@host/a", "http://...: cannot be read"),
        ("http://user:12#secret@host/a", "http://...: cannot be read"),
        ("http://host:port/a?sig=secret", "http://...: cannot be read"),
        ("http://user:secret@host\t/a", "http://...: cannot be read"),
        ("ftp://user:secret@host/a?sig=secret", "ftp://host/a: cannot be read"),
        ("http://user:[::1]secret@ho]st/a", "cannot be read"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(SourceNotFoundError) as caught:
        urls.parse(text)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_joined() -> None:
    assert urls.join("http://host/a", "b/c.json") == "http://host/a/b/c.json"
    assert urls.join("http://host/a/", "b") == "http://host/a/b"
    assert urls.join("http://host", "b") == "http://host/b"
    assert urls.join("http://host/a?sig=1", "b #?%.json") == "http://host/a/b%20%23%3F%25.json?sig=1"
    assert urls.last_part("http://host/a/b%20c.safetensors?x=/y") == "b c.safetensors"
    assert urls.parent("http://host/a/b.safetensors?x=1") == "http://host/a?x=1"


def test_shown() -> None:
    assert urls.shown("https://user:secret@host:8/a?sig=secret#secret") == "https://host:8/a"
    assert urls.shown("http://[") == "'http://['"


def test_origins() -> None:
    assert urls.origin("https://HOST/a") == urls.origin("https://host:443/b") == ("https", "host", 443)
    assert urls.origin("http://host/a") != urls.origin("https://host/a")
    assert urls.origin("http://host:81/a") != urls.origin("http://host/a")


@pytest.mark.parametrize(
    ("text", "url", "pair"),
    [
        ("http://proxy:3128", "http://proxy:3128", None),
        ("proxy:3128", "http://proxy:3128", None),
        ("https://user:p%40ss@proxy", "https://proxy", b"user:p@ss"),
        ("user:p@ss@[::1]:80/", "http://[::1]:80/", b"user:p@ss"),
    ],
)
def test_proxies(text: str, url: str, pair: bytes | None) -> None:
    authorization = None if pair is None else f"Basic {base64.b64encode(pair).decode()}"
    assert urls.proxy_of(text) == urls.Address(url=url, authorization=authorization)


@pytest.mark.parametrize(
    "text",
    [
        "http://host.example/a/b",
        "HTTP://HOST.example/a/b/",
        "http://host.example:80/a/b//",
        "http://user:password@Host.Example/a/b#part",
    ],
)
def test_ways_to_write_one_address_are_one(text: str) -> None:
    assert urls.same(text) == "http://host.example/a/b"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("https://host.example:443", "https://host.example"),
        ("https://host.example:80/A", "https://host.example:80/A"),
        ("http://[::1]:80/a", "http://[::1]/a"),
        ("http://host.example/a/?key=B/", "http://host.example/a?key=B/"),
    ],
)
def test_what_may_differ_between_addresses_stays(text: str, same: str) -> None:
    assert urls.same(text) == same
