"""Ranges of remote files against a server that does wrong: what is tried again, what is refused, who is told what."""

from __future__ import annotations

import random
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from manifests import answers, http, patience, urls
from manifests.errors import IntegrityError, ManifestError, RemoteError, SourceNotFoundError, ToolkitError
from manifests.http import RemoteFile, Web
from tests.file_server import Answer, Asked, FileServer, serve
from tests.wrong_answers import once

CONTENT = random.Random(1).randbytes(100_000)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(answers, "SILENCE_S", 5.0)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve({"/a": CONTENT, "/empty": b""}) as served:
        yield served


def file(server: FileServer, path: str = "/a") -> RemoteFile:
    return Web().file(server.url + path)


def test_ranges(server: FileServer) -> None:
    remote = file(server)
    assert remote.read(10, 20) == CONTENT[10:20]
    assert remote.read(0, len(CONTENT)) == CONTENT
    assert remote.read(99_999, 100_000) == CONTENT[-1:]
    assert remote.read(5, 5) == b""
    assert (remote.facts.size, remote.facts.etag) == (100_000, server.etag("/a"))
    # An empty range asks for nothing, and what is known is not asked for again.
    assert server.ranges == ["bytes=10-19", "bytes=0-99999", "bytes=99999-99999"]
    # One connection was enough.
    assert all(asked.headers["accept-encoding"] == "identity" for asked in server.asked)


def test_the_begin_of_a_file(server: FileServer) -> None:
    assert file(server).begin(100) == CONTENT[:100]
    assert file(server).begin(1_000_000) == CONTENT
    assert file(server, "/empty").begin(100) == b""
    assert file(server, "/empty").facts.size == 0


def test_a_stream_is_one_request(server: FileServer) -> None:
    stream = file(server).stream(1000, 90_000)
    found, buffer = b"", bytearray(7001)
    while count := stream.readinto(memoryview(buffer)):
        found += buffer[:count]
    assert found == CONTENT[1000:90_000]
    assert server.ranges == ["bytes=1000-89999"]


def test_a_connection_is_kept(server: FileServer) -> None:
    web = Web()
    for number in range(20):
        web.file(server.url + "/a").read(number, number + 10)
    pools = [pool for manager in web._managers.values() for pool in manager.pools._container.values()]
    assert [pool.num_connections for pool in pools] == [1]


@pytest.mark.parametrize("where", [0, 1, 777, 20_000])
def test_a_body_that_ends_early_goes_on_where_it_ended(server: FileServer, where: int) -> None:
    server.instead = once(lambda asked, right: right.cut(where, reset=where % 2 == 0), times=3)
    assert file(server).read(1000, 90_000) == CONTENT[1000:90_000]
    assert len(server.asked) == 4
    if where % 2:
        # Without a reset all that was sent arrived, and none of it was sent twice.
        assert server.ranges[1:] == [f"bytes={1000 + n * where}-89999" for n in (1, 2, 3)]
        assert server.sent() == 89_000


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server: FileServer, status: int) -> None:
    server.instead = once(lambda asked, right: Answer(status, {}, b"busy"), times=4)
    assert file(server).read(0, 10) == CONTENT[:10]
    assert len(server.asked) == 5


def test_a_server_that_stays_busy_is_given_up(server: FileServer) -> None:
    server.instead = lambda asked, right: Answer(503)
    with pytest.raises(RemoteError, match=r"/a: the server answers with status 503, 6 times in a row; run again"):
        file(server).read(0, 10)
    assert len(server.asked) == 6


def test_failures_with_bytes_between_them_are_borne_without_end(server: FileServer) -> None:
    server.instead = once(lambda asked, right: right.cut(500), times=40)
    assert file(server).read(0, 50_000) == CONTENT[:50_000]


@pytest.mark.parametrize("form", [str, lambda s: formatdate(time.time() + s, usegmt=True)])
def test_retry_after_is_honoured(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, form: Callable[[int], str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(http.time, "sleep", waited.append)
    server.instead = once(lambda asked, right: Answer(429, {"Retry-After": form(7)}))
    assert file(server).read(0, 10) == CONTENT[:10]
    assert len(waited) == 1
    assert 5 < waited[0] <= 7


def test_no_one_waits_for_hours(server: FileServer) -> None:
    server.instead = lambda asked, right: Answer(503, {"Retry-After": "7200"})
    with pytest.raises(RemoteError, match="asks to wait 7200 s; run again then"):
        file(server).read(0, 10)


def test_a_retry_after_that_is_none_is_no_harm(server: FileServer) -> None:
    server.instead = once(lambda asked, right: Answer(429, {"Retry-After": "soon"}), times=2)
    assert file(server).read(0, 10) == CONTENT[:10]


def test_pauses_grow(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(http.time, "sleep", waited.append)
    server.instead = lambda asked, right: Answer(500)
    with pytest.raises(RemoteError):
        file(server).read(0, 10)
    assert len(waited) == 5
    for number, pause in enumerate(waited):
        assert 0.75 * 2**number <= pause <= 1.25 * 2**number


@pytest.mark.parametrize("status", [404, 410])
def test_no_such_file(server: FileServer, status: int) -> None:
    server.instead = lambda asked, right: Answer(status)
    with pytest.raises(SourceNotFoundError, match=r"/a: the server has no such file$"):
        file(server).read(0, 10)
    assert Web().read(server.url + "/a", max_bytes=10) is None


@pytest.mark.parametrize("status", [401, 403])
def test_a_file_that_must_not_be_seen(server: FileServer, status: int) -> None:
    server.instead = lambda asked, right: Answer(status)
    for read in (lambda: file(server).read(0, 10), lambda: Web().read(server.url + "/a", max_bytes=10)):
        with pytest.raises(SourceNotFoundError, match=rf"does not let you read it \(status {status}\)"):
            read()
    assert len(server.asked) == 2


def test_a_server_without_ranges(server: FileServer) -> None:
    server.instead = lambda asked, right: Answer(200, {}, CONTENT)
    with pytest.raises(RemoteError, match="does not serve ranges"):
        file(server).read(0, 10)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "named",
    [
        "bytes 1-10/100000",
        "bytes 0-8/100000",
        "bytes 0-10/100000",
        "bytes 10-0/100000",
        "bytes 0-9/*",
        "items 0-9/100000",
        "bytes */100000",
        "bytes 0-9/99999999999999999999999",
        "",
    ],
)
def test_another_range_than_was_asked_for(server: FileServer, named: str) -> None:
    server.instead = lambda asked, right: Answer(206, {"Content-Range": named}, right.body)
    with pytest.raises((RemoteError, IntegrityError)):
        file(server).read(0, 10)
    assert len(server.asked) == 1


def test_several_parts_in_one_answer(server: FileServer) -> None:
    kind = {"Content-Type": "multipart/byteranges; boundary=x"}
    server.instead = lambda asked, right: Answer(206, kind, b"--x\r\n")
    with pytest.raises(RemoteError, match="status 206 and no range"):
        file(server).read(0, 10)


def test_a_body_that_is_longer_than_its_range_is_not_read(server: FileServer) -> None:
    server.instead = once(lambda asked, right: Answer(206, right.headers, right.body + b"more"))
    web = Web()
    assert web.file(server.url + "/a").read(0, 10) == CONTENT[:10]
    assert web.file(server.url + "/a").read(10, 20) == CONTENT[10:20]


@pytest.mark.parametrize("encoding", ["gzip", "br", "x-odd"])
def test_compressed_bytes_are_refused(server: FileServer, encoding: str) -> None:
    server.instead = lambda asked, right: Answer(right.status, right.headers | {"Content-Encoding": encoding}, b"")
    for read in (lambda: file(server).read(0, 10), lambda: Web().read(server.url + "/a", max_bytes=10**6)):
        with pytest.raises(RemoteError, match="compressed"):
            read()


def test_a_file_that_changed(server: FileServer) -> None:
    remote = file(server)
    remote.read(0, 10)
    server.files["/a"] = CONTENT[::-1]
    with pytest.raises(IntegrityError, match="changed on the server since it was first read; run again"):
        remote.read(10, 20)
    server.files["/a"] = CONTENT[:-1]
    with pytest.raises(IntegrityError, match="changed on the server"):
        remote.read(10, 20)


def test_a_file_that_changes_in_the_middle_of_a_range(server: FileServer) -> None:
    def cut(asked: Asked, right: Answer) -> Answer:
        server.files["/a"] = CONTENT[::-1]
        return right.cut(500)

    server.instead = once(cut)
    with pytest.raises(IntegrityError, match="changed on the server"):
        file(server).read(0, 1000)


@pytest.mark.parametrize("key", ["ETag", "Last-Modified"])
def test_a_change_is_known_by_either_word(server: FileServer, key: str) -> None:
    def answer(value: str) -> Callable[[Asked, Answer], Answer]:
        return lambda asked, right: Answer(
            206, {key: value, "Content-Range": right.headers["Content-Range"]}, right.body
        )

    remote = file(server)
    server.instead = answer("one")
    remote.read(0, 10)
    remote.read(10, 20)
    server.instead = answer("two")
    with pytest.raises(IntegrityError, match="changed on the server"):
        remote.read(20, 30)


def test_a_range_behind_the_end(server: FileServer) -> None:
    with pytest.raises(IntegrityError, match="ends at byte 100000, before 100001"):
        file(server).read(99_000, 100_001)
    with pytest.raises(IntegrityError, match="ends"):
        file(server).read(100_000, 100_001)


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({}) as server:
        url = server.url
    with pytest.raises(RemoteError, match=r"/a: its server cannot be reached, 3 times in a row; look at the address"):
        Web().file(f"{url}/a").read(0, 10)


def test_a_server_that_goes_away_and_comes_back(server: FileServer) -> None:
    remote = file(server)
    assert remote.read(0, 10) == CONTENT[:10]
    server.stop()
    with pytest.raises(RemoteError, match=r"/a: its server cannot be reached, 6 times in a row; run again later$"):
        remote.read(10, 20)
    server.start()
    assert remote.read(10, 20) == CONTENT[10:20]


def test_a_silent_server(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SILENCE_S", 0.05)
    monkeypatch.setattr(patience, "FIRST_TRIES", 2)

    def silent(asked: Asked, right: Answer) -> Answer:
        time.sleep(0.3)
        return right

    server.instead = silent
    with pytest.raises(RemoteError, match="sent nothing for 0 s, 2 times in a row"):
        file(server).read(0, 10)


# Redirects and credentials.


def test_a_redirect_is_followed_and_remembered(server: FileServer) -> None:
    with serve({"/data": CONTENT}) as other:
        server.instead = lambda asked, right: Answer(302, {"Location": f"{other.url}/data?signed"})
        remote = file(server)
        for at in range(0, 100, 10):
            assert remote.read(at, at + 10) == CONTENT[at : at + 10]
        assert (len(server.asked), len(other.asked)) == (1, 10)


def test_a_redirected_address_that_expired_is_asked_for_again(server: FileServer) -> None:
    with serve({"/1": CONTENT, "/2": CONTENT}) as other:
        server.instead = lambda asked, right: Answer(302, {"Location": f"{other.url}/{len(server.asked)}"})
        other.etag = lambda path: '"same"'
        remote = file(server)
        remote.read(0, 10)
        other.instead = lambda asked, right: Answer(403) if asked.path == "/1" else None
        assert remote.read(10, 20) == CONTENT[10:20]
        assert [asked.path for asked in other.asked] == ["/1", "/1", "/2"]


def test_a_password_goes_to_its_own_server_and_to_no_other(server: FileServer) -> None:
    with serve({"/data": CONTENT}) as other:
        server.instead = once(lambda asked, right: Answer(307, {"Location": "/moved"}))
        server.files["/moved"] = CONTENT
        web = Web({urls.origin(server.url): "Bearer secret"})
        web.file(server.url + "/a").read(0, 10)
        server.instead = lambda asked, right: Answer(302, {"Location": f"{other.url}/data"})
        web.file(server.url + "/a").read(0, 10)
        web.read(server.url + "/a", max_bytes=10**6)
    assert [asked.headers.get("authorization") for asked in server.asked] == ["Bearer secret"] * 4
    assert [asked.headers.get("authorization") for asked in other.asked] == [None, None]


def test_circles_and_other_schemes_are_not_followed(server: FileServer) -> None:
    for location, says in (
        ("/a", "redirected more than 5 times"),
        ("file:///etc/passwd", "which is not followed"),
        ("ftp://host/a", "which is not followed"),
        ("http://[::1", "leads nowhere"),
    ):
        server.instead = lambda asked, right, location=location: Answer(302, {"Location": location})  # type: ignore[misc]
        with pytest.raises(ToolkitError, match=says):
            file(server).read(0, 10)


# Small files.


def test_a_small_file_whole(server: FileServer) -> None:
    found = Web().read(server.url + "/a", max_bytes=100_000)
    assert found is not None
    assert (found.content, found.etag) == (CONTENT, server.etag("/a"))
    assert Web().read(server.url + "/a", max_bytes=100_000, etag=found.etag) is None
    assert Web().read(server.url + "/none", max_bytes=100) is None
    with pytest.raises(SourceNotFoundError):
        Web().read(server.url + "/none", max_bytes=100, etag='"x"')
    with pytest.raises(ManifestError, match="larger than 99999 bytes"):
        Web().read(server.url + "/a", max_bytes=99_999)


def test_a_small_file_that_ends_early_is_read_again(server: FileServer) -> None:
    server.instead = once(lambda asked, right: right.cut(50), times=3)
    found = Web().read(server.url + "/a", max_bytes=100_000)
    assert found is not None
    assert found.content == CONTENT


@pytest.mark.parametrize("status", [204, 206, 300, 400, 418])
def test_a_small_file_with_another_status(server: FileServer, status: int) -> None:
    server.instead = lambda asked, right: Answer(status)
    with pytest.raises(RemoteError, match=f"status {status}"):
        Web().read(server.url + "/a", max_bytes=10)


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key.pem", "-out",
         folder / "cert.pem", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_tls_is_verified(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with serve({"/a": CONTENT}, tls=context) as server:
        with pytest.raises(RemoteError, match=r"no secure connection.*SSL_CERT_FILE"):
            file(server).read(0, 10)
        assert not server.asked
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "none.pem"))
        with pytest.raises(RemoteError, match=r"SSL_CERT_FILE names .*none\.pem, and there is no such file"):
            file(server).read(0, 10)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        assert file(server).read(0, 10) == CONTENT[:10]
        # Off TLS is no way to be led.
        server.instead = lambda asked, right: Answer(302, {"Location": "http://127.0.0.1:1/a"})
        with pytest.raises(RemoteError, match="from https to http"):
            file(server).read(0, 10)


def test_https_to_a_server_that_speaks_http(server: FileServer) -> None:
    with pytest.raises(RemoteError, match="does not speak https, try http"):
        Web().file(server.url.replace("http:", "https:") + "/a").read(0, 10)


def test_a_slow_document_is_told(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "TOLD_PAUSE_S", 0.1)
    server.files["/a"], server.pause_s = bytes(400_000), 0.05
    with caplog.at_level("WARNING", logger="manifests"):
        found = Web().read(f"{server.url}/a", max_bytes=1_000_000)
    assert found is not None
    assert found.content == server.files["/a"]
    told = [record.getMessage() for record in caplog.records]
    assert 1 <= len(told) <= 4
    assert re.fullmatch(rf"{server.url}/a: \d+ of {len(found.content)} bytes have come", told[0])


def test_a_proxy_of_the_environment_is_used(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert Web().file("http://models.invalid/a").read(0, 10) == CONTENT[:10]
    assert server.asked[0].headers["host"] == "models.invalid"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert file(server).read(0, 10) == CONTENT[:10]
    assert server.asked[1].headers["host"].startswith("127.0.0.1")


def test_many_threads_share_one_file(server: FileServer) -> None:
    remote = file(server)
    refused: set[str | None] = set()

    def busy_at_first(asked: Asked, right: Answer) -> Answer | None:
        if asked.range in refused:
            return None
        refused.add(asked.range)
        return Answer(503)

    server.instead = busy_at_first
    wrong = []

    def read(number: int) -> None:
        for at in range(number, 100_000, 16_000):
            end = min(at + 1500, 100_000)
            if remote.read(at, end) != CONTENT[at:end]:
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(0, 16_000, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "urllib3", None)
    with pytest.raises(ToolkitError, match=r"pip install 'expert-reshard\[http\]'"):
        Web()
