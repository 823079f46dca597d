"""Run a program and say what it took: seconds, processor seconds, peak memory.

Linux counts what a process held before it became another program as that program's peak. So the program is started
by a small process of its own, this file run as a script, and not by a benchmark that may be large by then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class CommandError(Exception):
    """A measured program failed; the message ends with what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a program took, and its stdout."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    out: str

    @property
    def last_json(self) -> Any:
        """The last document of stdout, be it a line or indented."""
        text, document, decoder = self.out.lstrip(), None, json.JSONDecoder()
        while text:
            document, end = decoder.raw_decode(text)
            text = text[end:].lstrip()
        return document

    def over(self, size: int) -> dict[str, float | int]:
        """The figures of a benchmark's JSON line, for so many bytes."""
        return {
            "seconds": round(self.seconds, 3),
            "gb_per_s": round(size / self.seconds / 1e9, 3),
            "cpu_s_per_gb": round(self.cpu_seconds / size * 1e9, 3),
            "peak_bytes": self.peak_bytes,
        }


def run(command: Sequence[str | Path], *, folder: Path) -> Measured:
    """Run a program to its end in a folder; its stderr goes to ours only when it fails.

    Whatever ends this function early, an interrupt for one, ends the program too.

    Raises:
        CommandError: It did not end with 0.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile() as took:
        # A group of its own: a Ctrl-C is for the benchmark, which then ends the program in order.
        starter = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(took.fileno()), *map(str, command)],
            cwd=folder,
            stdout=out,
            stderr=err,
            pass_fds=[took.fileno()],
            process_group=0,
        )
        try:
            code = starter.wait()
        finally:
            _end(starter)
        out.seek(0)
        err.seek(0)
        took.seek(0)
        if code:
            said = "\n".join(err.read().strip().splitlines()[-20:])
            raise CommandError(f"{' '.join(map(str, command))} ended with {code}:\n{said}")
        return Measured(**json.load(took), out=out.read())


def _end(starter: subprocess.Popen[bytes]) -> None:
    """End what still runs in the group: asked first, so that it can clean up, and killed if that takes long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if starter.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(starter.pid, number)
        with suppress(subprocess.TimeoutExpired):
            starter.wait(timeout=60)


def _main() -> int:
    """Start a program, wait for it, and write what it took to the given descriptor."""
    result, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(result, False)
    # The signal is for the program, which may have to clean up; this process stays to wait for it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    begin = time.perf_counter()
    program = os.posix_spawnp(command[0], command, os.environ)
    _, status, used = os.wait4(program, 0)
    took = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
    }
    os.write(result, json.dumps(took).encode())
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_main())
