"""Opening a checkpoint on a web server: what is shown and said meanwhile, what ends it, and where the cache has it."""

from __future__ import annotations

import io
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import manifests
from manifests import hub
from runner import demo
from runner.cache_folder import ENVIRONMENT
from runner.loaded import LoadedModel
from runner.remote_checkpoint import open_cached
from tests.file_server import Answer, Asked, Fault, FileServer, no_fault, serve

Call = Callable[..., Result]
GENERATE = ("-p", "def main(", "-n", "6", "--temp", "0")
IDLE = "so --cache-size does nothing"


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory, reshard_folder: Callable[..., Path]) -> Path:
    return reshard_folder(demo.path(), tmp_path_factory.mktemp("demo") / "experts")


@pytest.fixture(autouse=True)
def cache(memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT, str(memory_folder / "cache"))
    return memory_folder / "cache"


@pytest.fixture
def shards() -> Iterator[FileServer]:
    """163 of them."""
    with serve(demo.path()) as server:
        yield server


# ---- interrupts ----


class Silence:
    """A server that, once it is asked for a file whose name has this in it, says nothing more of it."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.began, self.over = threading.Event(), threading.Event()

    def __call__(self, asked: Asked, right: Answer) -> Answer | None:
        if self.part not in asked.name:
            return None
        self.began.set()
        self.over.wait(60)
        return Answer(0)


@pytest.mark.parametrize(
    ("kind", "part", "is_warm", "number"),
    [
        ("resharded", "manifest.json", True, signal.SIGTERM),
        ("shards", "model-", False, signal.SIGINT),
        ("shards", "model-", True, signal.SIGTERM),
        ("resharded", "layers/2/dense", False, signal.SIGINT),
        ("resharded", "layers/2/experts", False, signal.SIGTERM),
    ],
)
def test_nobody_waits_for_a_silent_server(
    kind: str, part: str, is_warm: bool, number: signal.Signals, resharded: Path, call: Call, spawn: Callable[..., Any]
) -> None:
    """Whatever is fetched: a signal ends the command at once, and the next one fetches nothing twice."""
    with serve(resharded if kind == "resharded" else demo.path()) as server:
        if is_warm:
            assert call("generate", "-m", server.url, *GENERATE).exit_code == 0
        server.forget()
        server.instead = silence = Silence(part)
        process = spawn("generate", "-m", server.url, *GENERATE)
        assert silence.began.wait(60)
        time.sleep(0.2)
        begin = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - begin < 5
        assert (process.returncode, errors.strip()) == (130, b"runner: interrupted")
        silence.over.set()
        fetched = tensors_of(server) if not is_warm and kind == "resharded" else set()
        server.instead = no_fault
        server.forget()
        assert call("generate", "-m", server.url, *GENERATE).exit_code == 0
        assert not fetched & tensors_of(server)


def tensors_of(server: FileServer) -> set[tuple[str, tuple[int, int]]]:
    """What was sent whole of files with tensors."""
    return {
        (one.name, one.span)
        for one in server.asked
        if one.span is not None and one.status == 206 and one.sent == one.span[1] - one.span[0]
        if one.name.endswith(".safetensors")
    }


# ---- what is shown and said ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", [["doctor"], ["mtp"], ["logits", "--ids", "1,2"]], ids=lambda one: one[0])
def test_headers_are_counted_on_a_terminal(
    command: list[str], shards: FileServer, cache: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def isatty(self: io.TextIOWrapper) -> bool:
        return True

    for is_terminal, more in ((False, []), (True, []), (True, ["-q"])):
        shutil.rmtree(cache, ignore_errors=True)
        if more and command == ["doctor"]:
            continue
        with monkeypatch.context() as patch:
            if is_terminal:
                patch.setattr("click.testing._NamedTextIOWrapper.isatty", isatty, raising=False)
            result = call(*command, "-m", shards.url, *more)
        assert result.exit_code == 0, result.output
        assert "headers" not in result.stdout
        shown.append("headers" in result.stderr)
    assert shown == [False, True, False][: len(shown)]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "-p", "a", "-n", "1"],
        ["chat", "-n", "1"],
        ["logits", "--ids", "1,2"],
        ["eval", "-f", "-"],
        ["trace", "-p", "a", "-n", "1", "--out", "trace.json"],
        ["bench", "-n", "1", "--prompt-tokens", "1"],
        ["mtp"],
    ],
    ids=lambda one: one[0],
)
def test_a_bound_that_bounds_nothing_is_said(
    command: list[str], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more, is_said in ((["--cache-size", "1G"], True), ([], False), (["--cache-size", "1G", "-q"], False)):
        result = call(*command, *more, stdin="hello\n")
        assert result.exit_code == 0, result.output
        assert (IDLE in result.stderr) == is_said
        assert IDLE not in result.stdout


def test_doctor_says_that_the_cache_stands_in(resharded: Path, call: Call) -> None:
    with serve(resharded) as server:
        assert "cannot be reached" not in call("doctor", "-m", server.url).stdout
    result = call("doctor", "-m", server.url)
    assert result.exit_code == 0
    assert "cannot be reached" in result.stdout


def test_doctor_asks_whether_there_are_ranges(resharded: Path, call: Call) -> None:
    last = manifests.open(resharded).manifest.files[-1].path
    faults: dict[str, tuple[Fault, str]] = {
        "whole files": (lambda asked, right: Answer(200, {}, b"all") if asked.range else None, "does not serve ranges"),
        "gone": (lambda asked, right: Answer(404) if asked.name == last else None, "the server has no such file"),
    }
    for fault, says in faults.values():
        with serve(resharded) as server:
            assert "--io mmap" not in call("doctor", "-m", server.url).stdout
            server.instead = fault
            result = call("doctor", "-m", server.url)
        assert result.exit_code != 0
        assert "can run    yes" not in result.stdout
        assert says in result.stdout


def test_a_bound_of_a_model_on_a_server_is_not_idle(resharded: Path, call: Call) -> None:
    with serve(resharded) as server:
        result = call("logits", "-m", server.url, "--ids", "1,2", "--cache-size", "1G")
    assert result.exit_code == 0
    assert IDLE not in result.stderr


# ---- where the cache has it ----


def test_one_place_for_all_ways_to_write_an_address(resharded: Path, cache: Path) -> None:
    with serve(resharded) as server:
        port = server.url.rpartition(":")[2]
        for text in (f"http://localhost:{port}", f"HTTP://LOCALHOST:{port}//", f"http://me:secret@localhost:{port}/"):
            server.forget()
            open_cached(text)
        assert [one.status for one in server.asked if one.name == "manifest.json"] == [304]
    assert len(list((cache / "places").iterdir())) == 1


def test_two_addresses_of_one_checkpoint_share_what_was_fetched(resharded: Path) -> None:
    with serve(resharded) as server, serve(resharded) as other:
        LoadedModel(server.url, ctx=16).logits([1, 2])
        LoadedModel(other.url, ctx=16).logits([1, 2])
        assert other.sent(".safetensors") == 0


def test_a_state_that_comes_back_is_still_there(resharded: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(resharded, tmp_path / "copy")
    manifest, newer = (copy / "manifest.json").read_bytes(), tmp_path / "newer"
    with serve(copy) as server:
        LoadedModel(server.url, ctx=16).logits([1, 2])
        shutil.copytree(copy, newer)
        server.root = newer
        (copy / "manifest.json").unlink()
        (copy / "manifest.json").write_bytes(manifest)
        LoadedModel(server.url, ctx=16)
        server.root = copy
        server.forget()
        LoadedModel(server.url, ctx=16).logits([1, 2])
        assert server.sent(".safetensors") == 0


@pytest.mark.parametrize("kind", ["resharded", "shards"])
def test_no_secret_of_an_address_is_written_down(kind: str, resharded: Path, cache: Path) -> None:
    with serve(resharded if kind == "resharded" else demo.path()) as server:
        host = server.url.removeprefix("http://")
        LoadedModel(f"http://me:pass-word@{host}/?signature=top-secret", ctx=16).logits([1, 2])
    for path in cache.rglob("*"):
        assert not any(secret in str(path) for secret in ("pass-word", "top-secret"))
        if path.is_file() and path.stat().st_size < 1 << 20:
            raw = path.read_bytes()
            assert b"pass-word" not in raw
            assert b"top-secret" not in raw


def test_a_note_of_a_place_is_no_way_out_of_the_cache(resharded: Path, cache: Path, tmp_path: Path) -> None:
    """A hand that writes another key: the state must be what the key says."""
    with serve(resharded) as server:
        open_cached(server.url)
        (place,) = (cache / "places").iterdir()
        (state,) = (cache / "states").iterdir()
        outside = shutil.copytree(state, tmp_path / "outside")
        (outside / "manifest.json").write_bytes(b"{}")
        place.write_text(json.dumps({"note": {"state": str(outside), "etag": None, "base": ""}, "sha256": ""}))
        server.forget()
        open_cached(server.url)
        assert [one.status for one in server.asked if one.name == "manifest.json"] == [200]


def test_the_hub_in_capitals_is_the_hub(resharded: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(resharded) as server:
        files = {
            str(path.relative_to(resharded)): hub.Listed(size=path.stat().st_size, sha256=None)
            for path in resharded.rglob("*")
            if path.is_file()
        }
        monkeypatch.setattr(hub, "is_offline", lambda _: False)
        monkeypatch.setattr(
            hub,
            "resolve",
            lambda text: hub.Repository(
                name=text, url=server.url, commit="c", authorization=None, files=files, file=None
            ),
        )
        for text in ("hf://org/name", "HF://org/name/"):
            open_cached(text)
    assert len(list((cache / "places").iterdir())) == 1
