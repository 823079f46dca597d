"""Fuzz the parsers of headers, indexes, configs, manifests, journals, saved headers and GGUF files.

    python tests/fuzz/run.py --inputs 1000000 --seed 1 --jobs 2

Prints a table and one JSON line; exits with 1 when there was a finding. A finding is any exception that is no
ToolkitError, an accepted input that breaks a promise (see `targets`), an input that takes too long, or one that ends
the process. Each kind is saved once below build/fuzz. An input is made again from its seed and number alone:

    python tests/fuzz/run.py --seed 1 --only 123456
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from hostile import is_json
from inputs import WEIGHTS, make
from targets import Targets

from manifests.errors import ToolkitError

CPU_SECONDS = 2.0
"""One input may take this much of a processor; the largest that are allowed (100 MB) take a tenth of it."""

STUCK_SECONDS = 120.0
"""An input that takes this long by the clock is stuck, however busy the machine is."""

MEMORY_BYTES = 1 << 30
"""Address space of a worker, the interpreter and its libraries included."""

PORTION = 1000
FINDINGS = Path("build/fuzz")


@dataclass
class Tally:
    """What happened so far. Outcomes count (target, what): inputs, valid JSON, accepted, or the class of a refusal."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: list[tuple[float, int]] = field(default_factory=list)
    findings: dict[str, tuple[int, str]] = field(default_factory=dict)
    found: int = 0
    peak_bytes: int = 0

    def add(self, other: Tally) -> None:
        """Take in what another worker counted."""
        self.outcomes += other.outcomes
        self.slowest = heapq.nlargest(5, self.slowest + other.slowest)
        self.findings = other.findings | self.findings
        self.found += other.found
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)

    def report(self, kind: str, number: int, text: str) -> None:
        """Note a finding; the first of its kind is kept."""
        self.found += 1
        self.findings.setdefault(kind, (number, text))


def fuzz(targets: Targets, seed: int, numbers: Iterable[int], current: Synchronized[int] | None = None) -> Tally:
    """Run inputs one after the other.

    Args:
        targets: What to run.
        seed: With a number, it makes an input.
        numbers: Of the inputs.
        current: Told the number of each input before it is made.
    """
    tally = Tally()
    for number in numbers:
        if current is not None:
            current.value = number
        given = make(seed, number)
        tally.outcomes[given.target, "inputs"] += 1
        if given.json is not None and is_json(given.json):
            tally.outcomes[given.target, "JSON"] += 1
        began = time.process_time()
        try:
            targets.run(given)
            outcome = "accepted"
        except ToolkitError as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = "FOUND"
            tally.report(_kind(given.target, error), number, traceback.format_exc())
        seconds = time.process_time() - began
        tally.outcomes[given.target, outcome] += 1
        if seconds > CPU_SECONDS:
            tally.report(f"{given.target} slow", number, f"{seconds:.1f} s of CPU time")
        if len(tally.slowest) < 5 or seconds > tally.slowest[0][0]:
            tally.slowest = heapq.nsmallest(5, heapq.nlargest(5, [*tally.slowest, (seconds, number)]))
    tally.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return tally


def _kind(target: str, error: Exception) -> str:
    """Findings of one target, class and line are one."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{target} {type(error).__name__} {Path(frame.filename).stem}:{frame.lineno}"


def _work(pipe: Connection, scratch: Path, seed: int, numbers: range, current: Synchronized[int]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    targets = Targets(scratch)
    targets.watch()
    # In portions, so that what a worker counted is known when it dies.
    for start in range(0, len(numbers), PORTION):
        pipe.send(fuzz(targets, seed, numbers[start : start + PORTION], current))
    pipe.send(None)


def fuzz_in_processes(seed: int, numbers: range, jobs: int) -> Tally:
    """Run inputs in processes of bounded memory, and end any that is stuck."""
    tally = Tally()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as scratch:
        workers = {}
        for job in range(jobs):
            ours, theirs = multiprocessing.Pipe()
            current = multiprocessing.Value("q", -1)
            folder = Path(os.path.realpath(scratch)) / str(job)
            folder.mkdir()
            process = multiprocessing.Process(target=_work, args=(theirs, folder, seed, numbers[job::jobs], current))
            process.start()
            theirs.close()
            workers[ours] = process, current
        _collect(tally, workers, len(numbers))
    return tally


def _collect(tally: Tally, workers: dict[Connection, Any], inputs: int) -> None:
    """Wait until all workers are done, dead or stuck."""
    seen = {pipe: (-1, time.monotonic()) for pipe in workers}
    while workers:
        for pipe in wait(list(workers), timeout=STUCK_SECONDS / 10):
            process, current = workers[pipe]
            try:
                part = pipe.recv()
            except EOFError:
                process.join()
                tally.report("ended the process", current.value, f"exit code {process.exitcode}")
                part = None
            if part is None:
                process.join()
                del workers[pipe]
            else:
                tally.add(part)
                _show_progress(tally, inputs)
        for pipe, (process, current) in list(workers.items()):
            number, since = seen[pipe]
            if current.value != number:
                seen[pipe] = current.value, time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                process.kill()
                process.join()
                tally.report("stuck", number, f"no end after {STUCK_SECONDS:.0f} s")
                del workers[pipe]


def _show_progress(tally: Tally, inputs: int) -> None:
    done = sum(count for (_, what), count in tally.outcomes.items() if what == "inputs")
    if done * 20 // inputs != (done - PORTION) * 20 // inputs:
        sys.stderr.write(f"{done:,} of {inputs:,}, {tally.found} findings\n")


def show(tally: Tally, seed: int, seconds: float) -> None:
    """Print the table and the JSON line."""
    table = {target: Counter[str]() for target in WEIGHTS}
    for (target, what), count in tally.outcomes.items():
        table[target][what] += count
    table["total"] = sum(table.values(), Counter[str]())
    refusals = sorted({what for row in table.values() for what in row} - {"inputs", "JSON", "accepted"})
    columns = ["inputs", "JSON", "accepted", *refusals]
    lines = [f"{'target':<12}" + "".join(f"{column:>{max(11, len(column) + 2)}}" for column in columns)]
    for target, row in table.items():
        lines.append(f"{target:<12}" + "".join(f"{row[column]:>{max(11, len(column) + 2)},}" for column in columns))
    for taken, number in sorted(tally.slowest, reverse=True):
        given = make(seed, number)
        what = f"{given.target}, {'; '.join(given.trail)}"
        lines.append(f"slow: {taken * 1000:.1f} ms of CPU time, input {number} ({what})")
    lines += [f"\nFINDING {kind}: input {number}\n{text:.4000}" for kind, (number, text) in tally.findings.items()]
    total = table["total"]
    line = {
        "seed": seed,
        "inputs": total["inputs"],
        "valid_json": total["JSON"],
        "valid_json_share": round(total["JSON"] / max(1, total["inputs"]), 4),
        "accepted": total["accepted"],
        "refused": {name: total[name] for name in refusals if name != "FOUND"},
        "findings": tally.found,
        "slowest_ms": round(max(tally.slowest, default=(0.0, 0))[0] * 1000, 1),
        "peak_rss_mb": round(tally.peak_bytes / 1e6, 1),
        "seconds": round(seconds, 1),
        "targets": {target: dict(row) for target, row in table.items() if target != "total"},
    }
    sys.stdout.write("\n".join([*lines, "", json.dumps(line), ""]))


def save(tally: Tally, seed: int) -> None:
    """Put the input of each finding into a file, with what it did beside it."""
    for kind, (number, text) in tally.findings.items():
        FINDINGS.mkdir(parents=True, exist_ok=True)
        given = make(seed, number)
        path = FINDINGS / f"{seed}-{number}-{given.target}"
        path.with_suffix(".bin").write_bytes(given.data)
        path.with_suffix(".txt").write_text(f"{kind}\n{given.extra} {given.trail}\n{text}\n", encoding="utf-8")
        sys.stderr.write(f"saved {path}.bin\n")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other inputs")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", type=int, help="run the input of this number alone")
    arguments = parser.parse_args()
    numbers = range(arguments.inputs) if arguments.only is None else range(arguments.only, arguments.only + 1)
    began = time.monotonic()
    tally = fuzz_in_processes(arguments.seed, numbers, arguments.jobs)
    show(tally, arguments.seed, time.monotonic() - began)
    save(tally, arguments.seed)
    return bool(tally.found)


if __name__ == "__main__":
    sys.exit(main())
