"""The connections to a server are shared by the shards that still need them: the last one has them all."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reshard import fetching
from tests.file_server import Answer, Asked, serve

JOBS = 6


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_last_shard_has_all_connections(
    shards: int,
    tmp_path: Path,
    write_shards: Any,
    random_tensor: Any,
    monkeypatch: pytest.MonkeyPatch,
    program: Callable[..., Any],
) -> None:
    monkeypatch.setattr(fetching, "SEGMENT_BYTES", 2000)
    # The last one is longer: two of one size would come to their end together.
    tensors = [
        [random_tensor(f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight", "BF16", 10, 100) for e in range(count)]
        for layer, count in enumerate([30] * (shards - 1) + [90])
    ]
    folder = write_shards(tmp_path / "source", tensors)
    lock, under_way, most, together = threading.Lock(), Counter[str](), Counter[str](), 0

    def slow(asked: Asked, right: Answer) -> None:
        nonlocal together
        if asked.range is None or asked.range.startswith("bytes=0-"):
            return
        with lock:
            under_way[asked.path] += 1
            most[asked.path] = max(most[asked.path], under_way[asked.path])
            together = max(together, under_way.total())
        time.sleep(0.03)
        with lock:
            under_way[asked.path] -= 1

    with serve(folder) as server:
        server.instead = slow
        assert program("reshard", "run", server.url, tmp_path / "out", "--jobs", JOBS).code == 0
    counts = sorted(most.values())
    assert len(counts) == shards
    assert counts[-1] == JOBS
    # While two are read, each has its half.
    assert counts[0] <= (JOBS if shards == 1 else JOBS // 2)
    assert together <= JOBS
