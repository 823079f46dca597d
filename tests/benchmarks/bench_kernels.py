"""The compiled products beside their floor, the memory's bandwidth, and beside torch's way.

    python tests/benchmarks/bench_kernels.py [--gb 4.4] [--rounds 5]

DeepSeek-V3's two matrix shapes in FP8, and whole experts, over more memory than any cache holds, in huge pages. Every
round measures the floor and then every way in turn, so that their ratios hold though the machine is shared. A table
goes to stderr; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from report import finish, say
from torch import Tensor

from runner import kernels
from runner.fp8 import Matrix, Mlp, dequantize
from runner.kernels import Kernels

HIDDEN, WIDTH, BLOCK = 7168, 2048, 128
MATRIX_BYTES = HIDDEN * WIDTH
ROWS = (1, 2, 4, 16)


def main() -> None:
    """Measure, print, end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.4, help="weights that are passed over")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    library = kernels.library()
    if library is None:
        sys.exit("the kernels were not built: there was no compiler when the package was installed")
    memory = weights(options.gb)
    count = memory.numel() // MATRIX_BYTES // 3
    scale = torch.rand(WIDTH // BLOCK, HIDDEN // BLOCK) / 1000
    up = [matrix(memory, number, WIDTH, HIDDEN, scale) for number in range(3 * count)]
    down = [matrix(memory, number, HIDDEN, WIDTH, scale.T.contiguous()) for number in range(3 * count)]
    ways: dict[str, tuple[float, Callable[[], float]]] = {}
    for variant in kernels.supported():
        some = count if variant != "portable" else max(1, count // 20)
        compiled = Kernels(library, variant)
        for rows in ROWS if variant != "portable" else (1,):
            wide, narrow = torch.randn(rows, HIDDEN), torch.randn(rows, WIDTH)
            add(ways, f"{variant} gate/up rows={rows}", up[: 3 * some], linear(compiled, wide))
            add(ways, f"{variant} down rows={rows}", down[: 3 * some], linear(compiled, narrow))
        add(ways, f"{variant} expert", experts(up, down, some), expert(compiled, torch.randn(1, HIDDEN)), 3)
    add(ways, "torch gate/up rows=1", up[:4], lambda m: torch.randn(1, HIDDEN) @ dequantize(m).T)
    best = Kernels(library, kernels.supported()[-1])
    floors, rates = [], {name: [] for name in ways}
    for _ in range(options.rounds):
        floors.append(timed(lambda: best.read(memory), memory.numel()))
        for name, (size, call) in ways.items():
            rates[name].append(size / call())
    report(floors, rates)


def weights(gigabytes: float) -> Tensor:
    """Random codes but no NaN, in huge pages."""
    size = int(gigabytes * 1e9) // (3 * MATRIX_BYTES) * 3 * MATRIX_BYTES
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    codes = torch.frombuffer(memory, dtype=torch.uint8)
    piece = torch.randint(0, 127, (MATRIX_BYTES,), dtype=torch.uint8) | (
        torch.randint(0, 2, (MATRIX_BYTES,), dtype=torch.uint8) << 7
    )
    for begin in range(0, size, MATRIX_BYTES):
        codes[begin : begin + MATRIX_BYTES] = piece
    return codes


def matrix(memory: Tensor, number: int, rows: int, columns: int, scale: Tensor) -> Matrix:
    """One of them."""
    codes = memory[number * MATRIX_BYTES : (number + 1) * MATRIX_BYTES]
    return Matrix(weight=codes.view(torch.float8_e4m3fn).view(rows, columns), scale=scale)


def experts(up: list[Matrix], down: list[Matrix], count: int) -> list[Mlp]:
    """Three matrices that follow each other are one."""
    return [Mlp(gate=up[3 * n], up=up[3 * n + 1], down=down[3 * n + 2]) for n in range(count)]


def linear(compiled: Kernels, x: Tensor) -> Callable[[Matrix], Any]:
    """A product with the same activations."""
    return lambda matrix: compiled.linear(x, matrix)


def expert(compiled: Kernels, x: Tensor) -> Callable[[Mlp], Any]:
    """An expert's output."""
    return lambda one: compiled.experts([(one, None)], x, dtype=torch.float32)


def add(
    ways: dict[str, tuple[float, Callable[[], float]]],
    name: str,
    items: list[Any],
    call: Callable[[Any], Any],
    matrices: int = 1,
) -> None:
    """Note a way: the bytes it passes over, and how to take its time."""

    def measure() -> float:
        begin = time.perf_counter()
        for item in items:
            call(item)
        return time.perf_counter() - begin

    ways[name] = (len(items) * matrices * MATRIX_BYTES, measure)


def timed(call: Callable[[], Any], size: int) -> float:
    """Bytes per second."""
    begin = time.perf_counter()
    call()
    return size / (time.perf_counter() - begin)


def report(floors: list[float], rates: dict[str, list[float]]) -> None:
    """The table and the JSON line: medians, shares round by round."""
    floor = statistics.median(floors)
    say(f"{'memory, read alone':32} {floor / 1e9:7.2f} GB/s, {torch.get_num_threads()} threads")
    ways: dict[str, Any] = {}
    for name, found in rates.items():
        share = statistics.median(rate / floor for rate, floor in zip(found, floors, strict=True))
        rate = statistics.median(found)
        milliseconds = (3 if name.endswith("expert") else 1) * MATRIX_BYTES / rate * 1e3
        say(f"{name:32} {rate / 1e9:7.2f} GB/s  {share:6.1%}  {milliseconds:8.3f} ms")
        ways[name] = {"gbps": rate / 1e9, "share": share, "ms": milliseconds}
    document = {"threads": torch.get_num_threads(), "memory_read_gbps": floor / 1e9, "ways": ways}
    finish("kernels", document)


if __name__ == "__main__":
    main()
