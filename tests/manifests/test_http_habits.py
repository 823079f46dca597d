"""Habits of real web servers, stores and proxies that no standard asks for: none of them stops the reading."""

from __future__ import annotations

import base64
import logging
import random
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from manifests import answers, http, patience
from manifests.errors import ForbiddenError, IntegrityError, RemoteError
from manifests.http import RemoteFile, Web
from tests.file_server import Answer, Asked, FileServer, serve
from tests.wrong_answers import once

CONTENT = random.Random(2).randbytes(50_000)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve({"/a": CONTENT, "/empty": b""}) as served:
        yield served


def file(server: FileServer, path: str = "/a") -> RemoteFile:
    return Web().file(server.url + path)


@pytest.mark.parametrize(
    "answer",
    [Answer(200), Answer(416), Answer(416, {"Content-Range": "bytes */0"}), Answer(416, {"Content-Type": "text/xml"})],
    ids=["all of it", "without a range", "with one", "with an error page"],
)
def test_an_empty_file(server: FileServer, answer: Answer) -> None:
    """nginx sends all of it, S3 refuses the range without saying that there is nothing."""
    server.instead = lambda asked, right: answer
    assert file(server, "/empty").begin(100) == b""
    assert file(server, "/empty").facts.size == 0


def test_an_empty_answer_to_a_later_range_is_no_empty_file(server: FileServer) -> None:
    remote = file(server)
    remote.read(0, 10)
    for answer in (Answer(200), Answer(416)):
        server.instead = lambda asked, right, answer=answer: answer  # type: ignore[misc]
        with pytest.raises((RemoteError, IntegrityError)):
            remote.read(10, 20)
    server.instead = lambda asked, right: Answer(200)
    with pytest.raises(IntegrityError, match="changed on the server"):
        remote.read(0, 10)


def test_a_web_page_in_place_of_a_file_is_called_one(server: FileServer) -> None:
    kind = {"Content-Type": "text/html; charset=utf-8"}
    server.instead = lambda asked, right: Answer(200, kind, b"<!doctype html><title>Sign in")
    with pytest.raises(RemoteError, match="/a: the server sends a web page in its place; it may want you to log in"):
        file(server).read(0, 10)
    # Some send everything as HTML that they do not know.
    server.instead = lambda asked, right: Answer(right.status, right.headers | kind, right.body)
    assert file(server).read(0, 10) == CONTENT[:10]


@pytest.mark.parametrize("status", [520, 521, 522, 524, 529, 530, 509, 599])
def test_a_delivery_network_whose_origin_is_away_is_asked_again(server: FileServer, status: int) -> None:
    server.instead = once(lambda asked, right: Answer(status, {}, b"<html>"), times=4)
    assert file(server).read(0, 10) == CONTENT[:10]


@pytest.mark.parametrize("status", [501, 505])
def test_what_a_server_cannot_do_is_not_asked_for_again(server: FileServer, status: int) -> None:
    server.instead = lambda asked, right: Answer(status)
    with pytest.raises(RemoteError, match=f"status {status}"):
        file(server).read(0, 10)
    assert len(server.asked) == 1


@pytest.mark.parametrize("encoding", ["", "aws-chunked", "identity, aws-chunked", "IDENTITY"])
def test_encodings_that_change_nothing(server: FileServer, encoding: str) -> None:
    server.instead = lambda asked, right: Answer(
        right.status, right.headers | {"Content-Encoding": encoding}, right.body
    )
    assert file(server).read(5, 10) == CONTENT[5:10]


@pytest.mark.parametrize("names", [('"x"', 'W/"x"'), ('W/"x"', '"x"')])
def test_the_same_state_by_a_weak_name(server: FileServer, names: tuple[str, str]) -> None:
    """What packs on the way weakens a name; so one backend may, and another may not."""
    remote = file(server)
    for name in names:
        server.instead = lambda asked, right, name=name: Answer(206, right.headers | {"ETag": name}, right.body)  # type: ignore[misc]
        assert remote.read(10, 20) == CONTENT[10:20]
    server.instead = lambda asked, right: Answer(206, right.headers | {"ETag": 'W/"other"'}, right.body)
    with pytest.raises(IntegrityError, match="changed"):
        remote.read(20, 30)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_every_word_for_an_expired_signature(server: FileServer, status: int) -> None:
    with serve({"/1": CONTENT, "/2": CONTENT, "/3": CONTENT}) as other:
        other.etag = lambda path: '"same"'  # type: ignore[method-assign]
        server.instead = lambda asked, right: Answer(302, {"Location": f"{other.url}/{len(server.asked)}?sig=x"})
        valid = {"/1"}
        other.instead = lambda asked, right: None if asked.path in valid else Answer(status, {}, b"<Error>")
        remote = file(server)
        assert remote.read(0, 10) == CONTENT[:10]
        valid.clear()
        valid.add("/2")
        assert remote.read(10, 20) == CONTENT[10:20]
        # One that is refused when it is new is refused.
        valid.clear()
        with pytest.raises((ForbiddenError, RemoteError, FileNotFoundError)):
            remote.read(20, 30)
        assert len(server.asked) == 3


def test_a_redirect_to_a_server_that_died_is_asked_for_again(server: FileServer) -> None:
    with serve({"/a": CONTENT}) as left, serve({"/a": CONTENT}) as right:
        left.etag = right.etag = lambda path: '"same"'  # type: ignore[method-assign]
        targets = [left.url, right.url]
        server.instead = lambda asked, _: Answer(307, {"Location": f"{targets[0]}/a"})
        remote = file(server)
        assert remote.read(0, 10) == CONTENT[:10]
        targets.reverse()
        left.instead = lambda asked, right: Answer(206, right.headers, b"", declared=10, reset=True)
        assert remote.read(10, 20) == CONTENT[10:20]
    assert len(server.asked) == 2


def test_a_redirect_may_be_relative_and_in_any_letters(server: FileServer) -> None:
    server.files["/b/näme 1"] = CONTENT
    for location in ("b/näme 1".encode().decode("latin-1"), "b/n%C3%A4me%201", "../b/./n%c3%a4me 1?x#y"):
        server.instead = once(lambda asked, right, location=location: Answer(301, {"Location": location}))  # type: ignore[misc]
        assert file(server).read(0, 10) == CONTENT[:10]


@pytest.mark.parametrize("location", ["http://host:port/?sig=secret", "secret:x", "http://["])
def test_a_redirect_that_leads_nowhere_is_no_absence(server: FileServer, location: str) -> None:
    server.instead = lambda asked, right: Answer(302, {"Location": location})
    with pytest.raises(RemoteError, match="is redirected to an address") as refused:
        file(server).read(0, 10)
    assert "secret" not in str(refused.value).replace("'secret'", "")  # a scheme is not


def test_a_short_retry_after_does_not_shorten_the_pauses(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(http.time, "sleep", waited.append)
    for after in ("0", "1", "Thu, 01 Jan 1970 00:00:00 GMT"):
        waited.clear()
        server.instead = lambda asked, right, after=after: Answer(503, {"Retry-After": after})  # type: ignore[misc]
        with pytest.raises(RemoteError):
            file(server).read(0, 10)
        assert len(waited) == 5
        assert waited[4] >= 0.75 * 2**4


def test_a_refusal_of_a_signed_address_says_that_it_may_have_expired(server: FileServer) -> None:
    server.instead = lambda asked, right: Answer(403)
    with pytest.raises(ForbiddenError, match="the signature in the address may have expired") as refused:
        Web().file(f"{server.url}/a?sig=secret").read(0, 10)
    assert "secret" not in str(refused.value)


# Waiting.


def test_who_waits_is_told_once_for_all(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http.time, "sleep", lambda _: None)
    server.instead = once(lambda asked, right: Answer(429, {"Retry-After": "30"}), times=16)
    web = Web()
    threads = [threading.Thread(target=web.file(f"{server.url}/a?sig=secret").read, args=(0, 10)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.getMessage() for record in caplog.records if record.name == "manifests.patience"] == [
        f"{server.url}/a: the server answers with status 429; it is asked again in 30 s"
    ]


def test_short_pauses_are_not_worth_a_word(server: FileServer, caplog: pytest.LogCaptureFixture) -> None:
    server.instead = once(lambda asked, right: Answer(503), times=4)
    file(server).read(0, 10)
    assert not [record for record in caplog.records if record.name == "manifests.patience"]


def test_a_long_silence_is_told(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(answers, "SILENCE_S", 0.2)
    monkeypatch.setattr(patience, "TOLD_PAUSE_S", 0.1)
    go_on = threading.Event()

    def silent(asked: Asked, right: Answer) -> None:
        if len(server.asked) == 1:
            go_on.wait(5)

    server.instead = silent
    assert file(server).read(0, 10) == CONTENT[:10]
    go_on.set()
    (told,) = [record for record in caplog.records if record.name == "manifests.patience"]
    assert told.levelno == logging.WARNING
    assert "/a: its server sent nothing for 0 s; it is asked again in 0 s" in told.getMessage()


# Proxies.


@pytest.mark.parametrize("form", ["http://us%40er:pa%3Ass@{}", "us%40er:pa%3Ass@{}", "{}"])
def test_a_proxy_is_given_its_password(server: FileServer, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setenv("http_proxy", form.format(server.url.partition("://")[2]))
    monkeypatch.setenv("no_proxy", "")
    assert Web().file("http://models.invalid/a").read(0, 10) == CONTENT[:10]
    sent = server.asked[0].headers.get("proxy-authorization")
    expected = f"Basic {base64.b64encode(b'us@er:pa:ss').decode()}" if "@" in form else None
    assert sent == expected
    # The server behind it is not told.
    assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize(
    ("proxy", "says"),
    [
        ("socks5://127.0.0.1:1", "is no http"),
        ("http://:0", "address"),
        ("http://u:secret@127.0.0.1:1", "does not lead there"),
    ],
)
def test_a_proxy_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str, says: str) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(RemoteError, match=says) as refused:
        Web().file("http://models.invalid/a").read(0, 10)
    assert "secret" not in str(refused.value)


def test_a_proxy_that_wants_a_password(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    server.instead = lambda asked, right: Answer(407)
    with pytest.raises(RemoteError, match="the proxy of the environment wants a user and password"):
        Web().file("http://models.invalid/a").read(0, 10)
    assert len(server.asked) == 1


# What no library for servers does: bytes as they are.


def test_a_server_that_says_nothing_of_lengths() -> None:
    """HTTP/1.0, or chunks: the end of a body is the end of the connection, or stands in it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def answer() -> None:
            for number in range(6):
                connection, _ = listening.accept()
                with connection:
                    asked = b""
                    while b"\r\n\r\n" not in asked:
                        asked += connection.recv(4096)
                    head = b"ETag: x\r\nContent-Range: bytes 5-14/50000\r\n" if b"Range:" in asked else b""
                    status = b"206 Partial" if head else b"200 OK"
                    body = CONTENT[5:15]
                    if number % 2:
                        connection.sendall(b"HTTP/1.0 " + status + b"\r\n" + head + b"\r\n" + body)
                    else:
                        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:3], body[3:]))
                        more = b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
                        connection.sendall(b"HTTP/1.1 " + status + b"\r\n" + head + more + chunks + b"0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        remote = Web().file(f"{url}/a")
        for _ in range(4):
            assert remote.read(5, 15) == CONTENT[5:15]
        for _ in range(2):
            found = Web().read(f"{url}/a", max_bytes=10)
            assert found is not None
            assert found.content == CONTENT[5:15]
        thread.join()


def test_a_body_without_a_length_that_ends_early_goes_on() -> None:
    """As old servers have it: the end of the connection is that of the body, and may come too soon."""
    asked = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            lines = iter(self.rfile.readline, b"\r\n")
            begin, end = next(
                map(int, line.split(b"=")[1].split(b"-")) for line in list(lines) if line.startswith(b"Range")
            )
            asked.append(begin)
            self.wfile.write(b"HTTP/1.0 206 Partial Content\r\n")
            self.wfile.write(b"Content-Range: bytes %d-%d/%d\r\n\r\n" % (begin, end, len(CONTENT)))
            self.wfile.write(CONTENT[begin : end + 1][: 400 if begin < 800 else None])

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        assert Web().file(f"http://127.0.0.1:{server.server_address[1]}/a").read(0, 2000) == CONTENT[:2000]
        server.shutdown()
    assert asked == [0, 400, 800]
