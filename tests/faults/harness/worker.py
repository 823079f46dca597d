"""A process that does cases, one JSON line each: asked on stdin, answered on stdout. See `pool`.

It imports what the product imports and nothing more, and never has a second thread, so it can fork.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tqdm
from harness import chance, child, flips
from harness.cases import judge, steps_of
from harness.proof import prove
from harness.scenarios import SCENARIOS, Stage
from harness.toy import TOYS, Toy

SETTINGS = {"BLOCK_BYTES": 16384, "DIRECT_MIN_BYTES": 4096, "CHUNK_BYTES": 8192, "RING_BLOCKS": 4}
"""Constants of the product that are lowered, so that small tensors take the way of large ones."""


def main() -> None:
    """Answer until stdin ends."""
    # What a forked child prints must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tqdm.tqdm.monitor_interval = 0
    # Whoever stops the sweep stops the workers too, and their folders go all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    child.PROGRAMS["toy"] = Toy()
    settings = sorted(lower_settings())
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory_folder()) as work:
        stages: dict[str, Stage] = {}

        def stage(name: str) -> Stage:
            if name not in stages:
                stages[name] = Stage((SCENARIOS | TOYS)[name], Path(work).resolve() / name)
            return stages[name]

        for line in sys.stdin:
            task = json.loads(line)
            started = time.perf_counter()
            answer = {"task": task, "settings": settings, **_answer(task, stage)}
            answer["seconds"] = time.perf_counter() - started
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _answer(task: dict[str, Any], stage: Callable[[str], Stage]) -> dict[str, Any]:
    try:
        staged = stage(task["scenario"])
        match task["do"]:
            case "steps":
                return steps_of(staged)
            case "prove":
                return {"wrong": prove(staged)}
            case "case":
                verdict = judge(staged, task["faults"], readers=task.get("readers", False))
                return {"wrong": verdict.wrong, "fired": verdict.fired, "codes": verdict.codes}
            case "chance":
                return chance.play(staged, task["seed"])
            case "half":
                return flips.leave_half(staged, Path(task["folder"]))
            case "flip":
                count, wrong = flips.play(staged, task["state"], task["part"], task["parts"], task["limit"])
                return {"wrong": "\n    ".join(wrong), "cases": count}
        raise ValueError(task["do"])
    except Exception as error:
        return {"wrong": f"the harness itself failed: {type(error).__name__}: {error}"}


def lower_settings() -> set[str]:
    """Lower the constants in every module that has them; return those that were found."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("reshard", "manifests"):
            for constant in SETTINGS.keys() & vars(module).keys():
                setattr(module, constant, SETTINGS[constant])
                found.add(constant)
    return found


def memory_folder() -> str | None:
    """A file system in memory, if there is one with room: fast, and no other program's disk is kept busy."""
    folder = Path("/dev/shm")
    if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 64_000_000:
        return str(folder)
    return None


if __name__ == "__main__":
    main()
