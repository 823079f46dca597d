"""The compiled products beside their floor, the memory's bandwidth, and beside torch's way.

    python tests/benchmarks/bench_kernels.py [--gb 4.4] [--rounds 5] [--only SUBSTRING]

DeepSeek-V3's two matrix shapes in FP8, whole experts, and matrices of bfloat16 and float32, over more memory than any
cache holds, in huge pages as the runner's weights lie. The floor is measured before every way of every round, so that
their ratios hold though the machine is shared. A table goes to stderr; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import functools
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
ROWS = (1, 2, 4, 8, 16)
MANY_ROWS = (48, 64, 512)
ROUNDED_ROWS = (4, 8, 16, *MANY_ROWS)
"""With activations of bfloat16; fewer rows take the products of float32."""


def main() -> None:
    """Measure, print, end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.4, help="weights that are passed over")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="ways whose name has this in it")
    options = parser.parse_args()
    library = kernels.library()
    if library is None:
        sys.exit("the kernels were not built: there was no compiler when the package was installed")
    memory = weights(options.gb)
    best = Kernels(library, kernels.supported()[-1])
    ways = {name: way for name, way in every_way(memory).items() if options.only in name}
    if not ways:
        sys.exit(f"no way has {options.only!r} in its name")
    floors: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            floors[name].append(timed(lambda: best.read(memory), memory.numel()))
            rates[name].append(timed(way.call, way.size))
    report(ways, floors, rates)


class Way:
    """Something to take the time of.

    Attributes:
        size: Bytes of weights that it passes over.
        one: Bytes of one matrix or expert.
        flops: Multiplications and additions with each of them.
    """

    def __init__(self, items: list[Any], call: Callable[[Any], Any], *, one: int = MATRIX_BYTES, flops: int) -> None:
        self.size, self.one, self.flops = one * len(items), one, flops
        self._items, self._call = items, call

    def call(self) -> None:
        for item in self._items:
            self._call(item)


def every_way(memory: Tensor) -> dict[str, Way]:
    """By name; the slow ones pass over less memory."""
    library = kernels.library()
    assert library is not None
    count = memory.numel() // MATRIX_BYTES
    scale = torch.rand(WIDTH // BLOCK, HIDDEN // BLOCK) / 1000
    up = [matrix(memory, number, WIDTH, HIDDEN, scale) for number in range(count)]
    down = [matrix(memory, number, HIDDEN, WIDTH, scale.T.contiguous()) for number in range(count)]
    flops = 2 * MATRIX_BYTES
    ways: dict[str, Way] = {}
    for variant in kernels.supported():
        compiled, fast = Kernels(library, variant), variant != "portable"
        for rows in ROWS + MANY_ROWS if fast else ROWS[:1]:
            some = max(2, count // max(rows // 2, 1 if fast else 20))
            wide, narrow = torch.randn(rows, HIDDEN), torch.randn(rows, WIDTH)
            ways[f"{variant} gate/up rows={rows}"] = Way(up[:some], linear(compiled, wide), flops=flops * rows)
            ways[f"{variant} down rows={rows}"] = Way(down[:some], linear(compiled, narrow), flops=flops * rows)
            if variant != "avx512-vbmi" or rows not in ROUNDED_ROWS:
                continue
            for name, matrices, x in (("gate/up", up, wide), ("down", down, narrow)):
                call = linear(compiled, x.bfloat16().float(), dtype=torch.bfloat16)
                ways[f"{variant} {name} rounded rows={rows}"] = Way(matrices[:some], call, flops=flops * rows)
        some = max(1, count // (3 if fast else 60))
        one = expert(compiled, torch.randn(1, HIDDEN))
        ways[f"{variant} expert"] = Way(experts(up, down, some), one, one=3 * MATRIX_BYTES, flops=3 * flops)
        for dtype in (torch.bfloat16, torch.float32) if fast else ():
            size = dtype.itemsize
            plain = [Matrix(weight=m.weight.view(dtype).view(-1, HIDDEN), scale=None) for m in up]
            way = Way(plain, linear(compiled, torch.randn(1, HIDDEN)), flops=flops // size)
            ways[f"{variant} {str(dtype)[6:]} rows=1"] = way
    ways["torch gate/up rows=1"] = Way(up[:4], lambda m: torch.randn(1, HIDDEN) @ dequantize(m).T, flops=flops)
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(WIDTH, HIDDEN).to(dtype)
        for rows in MANY_ROWS:
            call = functools.partial(torch.nn.functional.linear, torch.randn(rows, HIDDEN).to(dtype))
            way = Way([weight] * 4, call, one=dtype.itemsize * MATRIX_BYTES, flops=flops * rows)
            ways[f"torch {str(dtype)[6:]} rows={rows}"] = way
    return ways


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


def linear(compiled: Kernels, x: Tensor, *, dtype: torch.dtype = torch.float32) -> Callable[[Matrix], Any]:
    """A product with the same activations."""
    return lambda matrix: compiled.linear(x, matrix, dtype=dtype)


def expert(compiled: Kernels, x: Tensor) -> Callable[[Mlp], Any]:
    """An expert's output."""
    return lambda one: compiled.experts([(one, None)], x, dtype=torch.float32)


def timed(call: Callable[[], Any], size: int) -> float:
    """Bytes per second."""
    begin = time.perf_counter()
    call()
    return size / (time.perf_counter() - begin)


def report(ways: dict[str, Way], floors: dict[str, list[float]], rates: dict[str, list[float]]) -> None:
    """The table and the JSON line: medians; shares of the floor that was measured beside."""
    floor = statistics.median(rate for found in floors.values() for rate in found)
    say(f"{'memory, read alone':32} {floor / 1e9:7.2f} GB/s, {torch.get_num_threads()} threads")
    described: dict[str, Any] = {}
    for name, way in ways.items():
        share = statistics.median(rate / beside for rate, beside in zip(rates[name], floors[name], strict=True))
        rate = statistics.median(rates[name])
        milliseconds, gflops = way.one / rate * 1e3, way.flops * rate / way.one / 1e9
        say(f"{name:32} {rate / 1e9:7.2f} GB/s  {share:6.1%}  {milliseconds:8.3f} ms  {gflops:7.1f} GFLOP/s")
        described[name] = {"gbps": rate / 1e9, "share": share, "ms": milliseconds, "gflops": gflops}
    document = {"threads": torch.get_num_threads(), "memory_read_gbps": floor / 1e9, "ways": described}
    finish("kernels", document)


if __name__ == "__main__":
    main()
