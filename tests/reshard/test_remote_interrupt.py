"""Ctrl-C and a service manager's stop while a server is silent or asks to wait: nobody waits for a server."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manifests.paths import TEMP_SUFFIX
from tests.file_server import Answer, Asked, FileServer, no_fault, serve

PATIENCE_S = 8.0
"""On a busy machine; a silent server is waited for much longer."""

EXPERT = "layers/2/experts/04.safetensors"
START = """
import importlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
name = sys.argv[1]
getattr(importlib.import_module(f"{name}.cli"), name).main(sys.argv[2:], prog_name=name)
"""


@pytest.fixture(scope="module")
def _shards(v3_folder: Path) -> Iterator[FileServer]:
    with serve(v3_folder) as server:
        yield server


@pytest.fixture(scope="module")
def _copy(v3_resharded: Path) -> Iterator[FileServer]:
    with serve(v3_resharded) as server:
        yield server


def is_payload(asked: Asked) -> bool:
    return asked.path.endswith(".safetensors") and asked.range is not None and not asked.range.startswith("bytes=0-")


def is_tokenizer(asked: Asked) -> bool:
    return asked.path == "/tokenizer.json"


def is_shard(asked: Asked) -> bool:
    return asked.path.startswith("/model-00012")


@pytest.mark.parametrize(
    ("how", "number"), [("silent", signal.SIGINT), ("asks to wait", signal.SIGTERM)], ids=["silent", "asks to wait"]
)
@pytest.mark.parametrize(
    ("source", "command", "when"),
    [
        ("_shards", "reshard verify DST --against URL", is_tokenizer),
        ("_shards", "reshard verify DST --against URL", is_shard),
        ("_shards", "reshard repair DST --from URL", is_payload),
        ("_copy", "reshard repair DST --from URL", is_payload),
        ("_shards", "reshard plan URL", is_tokenizer),
        ("_shards", "manifests show URL", is_shard),
    ],
    ids=["verify file", "verify header", "repair from shards", "repair from copy", "plan", "show"],
)
def test_an_interrupt_ends_it(
    request: pytest.FixtureRequest,
    resharded_copy: Path,
    source: str,
    command: str,
    when: Callable[[Asked], bool],
    how: str,
    number: signal.Signals,
) -> None:
    server: FileServer = request.getfixturevalue(source)
    asked_it, go_on = threading.Event(), threading.Event()

    def fault(asked: Asked, right: Answer) -> Answer | None:
        if not when(asked):
            return None
        asked_it.set()
        if how == "asks to wait":
            return Answer(503, {"Retry-After": "100"})
        go_on.wait(30)
        return None

    damaged = bytearray((resharded_copy / EXPERT).read_bytes())
    damaged[5000] ^= 1
    (resharded_copy / EXPERT).write_bytes(damaged)
    server.instead = fault
    arguments = command.replace("DST", str(resharded_copy)).replace("URL", server.url).split()
    with subprocess.Popen(
        [sys.executable, "-c", START, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert asked_it.wait(20)
            time.sleep(0.3)
            process.send_signal(number)
            began = time.monotonic()
            _, err = process.communicate(timeout=20)
            assert time.monotonic() - began < PATIENCE_S
        finally:
            go_on.set()
            process.kill()
            server.instead = no_fault
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"{arguments[0]}: interrupted"
    assert err.count("asked again in 100 s") == (how == "asks to wait")
    # What was half-made is gone.
    assert not list(resharded_copy.rglob(f"*{TEMP_SUFFIX}"))
    assert (resharded_copy / EXPERT).read_bytes() == damaged
