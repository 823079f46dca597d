"""One command in a forked child, on a disk with a fault: milliseconds instead of a new interpreter.

The parent has imported everything and has one thread, so the child can start threads of its own. What the child said,
which calls it made and what its disk would hold come back through anonymous files, also from a child that was killed.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.faults import Fault, Step
from harness.layer import Layer
from harness.model import Model

import manifests.cli
import reshard.cli

PROGRAMS: dict[str, Any] = {"reshard": reshard.cli.reshard, "manifests": manifests.cli.manifests}
SECONDS = 30
"""A command that takes so long hangs: an undisturbed one takes a tenth of a second."""
EXIT_TRACEBACK, EXIT_THREADS = 97, 98


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code; negative for a signal.
        out, err: What it said.
        steps: Its calls below the root.
        model: What its disk would hold; None where no layer was in place.
    """

    code: int
    out: str
    err: str
    steps: Sequence[Step] = ()
    model: Model | None = None

    @property
    def points(self) -> int:
        """How often it changed the disk."""
        return max((step.point for step in self.steps), default=0)


def run(
    command: Sequence[str],
    root: Path,
    graveyard: Path,
    model: Model,
    fault: Fault,
    *,
    direct: bool,
) -> Ended:
    """Run a command line of ours in a child, on the disk below root.

    Args:
        command: Program and arguments.
        root, graveyard, model, fault, direct: See `layer.Layer`.
    """
    said = [os.memfd_create(name) for name in ("out", "err", "will")]

    def work() -> int:
        layer: Layer

        def last_will() -> None:
            with open(said[2], "wb", closefd=False) as file:
                pickle.dump((layer.steps, layer.model), file)

        layer = Layer(root, graveyard, model, fault, direct=direct, last_will=last_will)
        layer.install()
        try:
            return _call(command)
        finally:
            last_will()

    code = fork(work, said[:2])
    out, err, will = (_read(descriptor) for descriptor in said)
    steps, model_after = pickle.loads(will) if will else ((), None)
    return Ended(code=code, out=out.decode(), err=err.decode(), steps=steps, model=model_after)


def look(command: Sequence[str], *, kill_after: float | None = None) -> Ended:
    """Run a command in a child, on the disk as it is; perhaps with SIGKILL after so many seconds, wherever it is."""
    said = [os.memfd_create(name) for name in ("out", "err")]
    code = fork(lambda: _call(command), said, kill_after=kill_after)
    out, err = (_read(descriptor).decode() for descriptor in said)
    return Ended(code=code, out=out, err=err)


def fork(work: Callable[[], int], said: Sequence[int] = (), *, kill_after: float | None = None) -> int:
    """Do some work in a child; return its exit code, negative for a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = EXIT_TRACEBACK
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for number, descriptor in enumerate(said, start=1):
                os.dup2(descriptor, number)
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=2)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _call(command: Sequence[str]) -> int:
    program, *arguments = command
    try:
        PROGRAMS[program].main(arguments, prog_name=program)
    except SystemExit as ended:
        others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
        for thread in others:
            thread.join(SECONDS / 3)
        if any(thread.is_alive() for thread in others):
            sys.stderr.write(f"threads are left: {others}\n")
            return EXIT_THREADS
        return _code(ended.code)
    return 0


def _code(code: Any) -> int:
    return code if isinstance(code, int) else 0 if code is None else 1


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read()
