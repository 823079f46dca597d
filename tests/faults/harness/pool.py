"""Several workers, each a process of its own with one thread, and a queue of tasks before them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Pool:
    """Workers that are started when they are needed. A context manager: none outlives it."""

    def __init__(self, size: int | None = None) -> None:
        self._size = size or os.cpu_count() or 1
        self._free: list[subprocess.Popen[str]] = []
        self._all: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self._size)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            assert worker.stdin is not None
            worker.stdin.close()  # it ends, and takes its folder with it
        for worker in self._all:
            worker.wait(60)
            assert worker.stdout is not None
            worker.stdout.close()

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """Have one task done."""
        with self._lock:
            worker = self._free.pop() if self._free else self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(task) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        if not answer:
            raise RuntimeError(f"a worker ended at {task}")
        with self._lock:
            self._free.append(worker)
        return json.loads(answer)

    def map(self, tasks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Have tasks done, in order of their ends within reason; yields answers in order of the tasks."""
        return self._threads.map(self.ask, tasks)

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        worker = subprocess.Popen(
            [sys.executable, "-m", "harness.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._all.append(worker)
        return worker
