"""Faults on order: a disk that fails at the n-th call, and programs that are stopped in mid-run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from manifests.schema import Selection
from reshard.plan import Plan, make_plan
from reshard.progress import Progress
from reshard.run import reshard_checkpoint
from reshard.source import SourceCheckpoint, read_source


@pytest.fixture
def fail_call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let the n-th call of an os function fail, counted from 1, and all later ones of it too, but not of `open`."""

    def install(name: str, number: int, code: int = errno.EIO) -> list[int]:
        real, calls = getattr(os, name), [0]

        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            # Who cannot open folders cannot clean up either.
            if calls[0] == number or (calls[0] > number and name != "open"):
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)
        return calls

    return install


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., tuple[SourceCheckpoint, Plan]]:
    """Source and plan of a folder."""

    def plan(folder: Path, selection: Selection | None = None) -> tuple[SourceCheckpoint, Plan]:
        source = read_source(folder)
        return source, make_plan(source, selection or Selection())

    return plan


@pytest.fixture
def run_planned() -> Callable[..., Any]:
    """Run a plan that was made before, so that things can happen in between."""

    def run(source: SourceCheckpoint, plan: Plan, destination: Path, jobs: int = 2) -> Any:
        with Progress(0, label="", quiet=True) as progress:
            return reshard_checkpoint(source, plan, destination, jobs=jobs, progress=progress)

    return run


SLOW = r"""
import os, signal, sys, time
from reshard.cli import reshard
from reshard.progress import Progress
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
advance = Progress.advance
def slow(self, count):
    advance(self, count)
    os.write(1, b"moving\n")  # print would mix the lines of two threads
    time.sleep(0.02)
Progress.advance = slow
os.fsync = lambda descriptor: None
reshard.main(sys.argv[1:], prog_name="reshard")
"""


@pytest.fixture
def stop_in_mid_run() -> Callable[..., tuple[int, str]]:
    """Run `reshard` in another process, slowly, and send it signals when it moves bytes."""

    def run(
        arguments: Sequence[object], *signals: signal.Signals, then: Callable[[], None] | None = None
    ) -> tuple[int, str]:
        with subprocess.Popen(
            [sys.executable, "-c", SLOW, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for _ in range(3):
                assert process.stdout.readline() == "moving\n"
            if then is not None:
                then()
            for number in signals:
                process.send_signal(number)
            process.stdout.read()
            err = process.stderr.read()
        return process.returncode, err

    return run
