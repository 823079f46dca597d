"""Products with ggml's quantised blocks beside their floor, the memory's bandwidth.

    python tests/benchmarks/bench_quantised.py [--gb 1.0] [--rounds 5] [--types Q4_K,Q6_K] [--only SUBSTRING]

For each type matrices of DeepSeek-V2-Lite's and V3's widths, and V2-Lite's experts, six in one call as a token has
them; where their rows are no whole blocks of the type, `down` has the type that llama.cpp takes instead. More memory
than any cache holds is passed over, in huge pages, and the floor is measured before every way of every round. A table
goes to stderr; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_kernels import Way, timed
from report import finish, say
from torch import Tensor

from runner import kernels
from runner.fp8 import Matrix, Mlp
from runner.kernels import Kernels
from runner.quantised import BLOCKS

WIDE = {"V2-Lite": (1408, 2048), "V3": (2048, 7168)}
"""Rows and columns of gate and up."""

INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 numbers of a block are, if not at its begin alone."""

TOKENS = (1, 2, 4, 16)
EXPERTS = 6


def main() -> None:
    """Measure, print, end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="weights that are passed over")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--types", default="Q4_0,Q4_1,Q5_0,Q5_1,Q8_0,IQ4_NL,Q4_K,Q5_K,Q6_K")
    parser.add_argument("--only", default="", help="ways whose name has this in it")
    options = parser.parse_args()
    library = kernels.library()
    if library is None:
        sys.exit("the kernels were not built: there was no compiler when the package was installed")
    best = Kernels(library, kernels.supported()[-1])
    memory, described = huge_pages(int(options.gb * 1e9)), {}
    for encoding in options.types.split(","):
        ways = {name: way for name, way in every_way(memory, encoding) if options.only in name}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                floor = timed(lambda: best.read(memory), memory.numel())
                found[name].append((floor, timed(way.call, way.size)))
        for name, rates in found.items():
            described[name] = describe(name, ways[name], rates)
    finish("quantised", {"threads": torch.get_num_threads(), "ways": described})


def every_way(memory: Tensor, encoding: str) -> list[tuple[str, Way]]:
    """With their names; the slow ones pass over less memory."""
    library = kernels.library()
    assert library is not None
    ways = []
    for variant in kernels.supported():
        if variant == "avx512-vbmi":  # has the same products with these
            continue
        compiled, few = Kernels(library, variant), 30 if variant == "portable" else 1
        for model, (rows, columns) in WIDE.items():
            matrices = fill(memory, encoding, rows, columns)
            for tokens in TOKENS if few == 1 else TOKENS[:1]:
                some = matrices[: max(2, len(matrices) // few // max(1, tokens // 2))]
                call = product(compiled, torch.randn(tokens, columns))
                size, flops = some[0].weight.numel(), 2 * rows * columns * tokens
                ways.append((f"{variant} {encoding} {model} tokens={tokens}", Way(some, call, one=size, flops=flops)))
        rows, columns = WIDE["V2-Lite"]
        groups = six_experts(memory, encoding, rows, columns)
        groups = groups[: max(2, len(groups) // few)]
        size = sum(m.weight.numel() for mlp in groups[0] for m in (mlp.gate, mlp.up, mlp.down))
        call = experts(compiled, torch.randn(1, columns))
        ways.append(
            (f"{variant} {encoding} V2-Lite experts", Way(groups, call, one=size, flops=EXPERTS * 6 * rows * columns))
        )
    return ways


def huge_pages(size: int) -> Tensor:
    """Memory as the runner's weights have it."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def blocks(encoding: str, count: int) -> Tensor:
    """Random ones, [count, bytes], whose scales are numbers."""
    found = torch.randint(0, 256, (count, BLOCKS[encoding][1]), dtype=torch.uint8)
    for at in SCALES.get(encoding, (0,)):
        found[:, at : at + 2] = torch.rand(count, 1).div(100).half().view(torch.uint8)
    return found


def row_bytes(encoding: str, columns: int) -> int:
    """Of one row."""
    return columns // BLOCKS[encoding][0] * BLOCKS[encoding][1]


def fill(memory: Tensor, encoding: str, rows: int, columns: int) -> list[Matrix]:
    """Matrices side by side over all of the memory, which keeps whatever bytes were written to it first.

    Every pass of every shape reads the same bytes, as blocks: the time does not depend on the numbers.
    """
    size = rows * row_bytes(encoding, columns)
    width = BLOCKS[encoding][1]
    some = blocks(encoding, 1 << 16).flatten()
    for begin in range(0, memory.numel(), some.numel()):
        part = memory[begin : begin + some.numel()]
        part.copy_(some[: part.numel()])
    assert some.numel() % width == 0
    return [
        Matrix(weight=memory[at : at + size].view(rows, -1), scale=None, encoding=encoding)
        for at in range(0, memory.numel() - size + 1, size)
    ]


def six_experts(memory: Tensor, encoding: str, rows: int, columns: int) -> list[list[Mlp]]:
    """As many calls' experts as the memory holds."""
    below = encoding if rows % BLOCKS[encoding][0] == 0 else INSTEAD[encoding]
    up, down = rows * row_bytes(encoding, columns), columns * row_bytes(below, rows)
    found, at = [], 0

    def take(size: int, height: int, kind: str) -> Matrix:
        nonlocal at
        matrix = Matrix(weight=memory[at : at + size].view(height, -1), scale=None, encoding=kind)
        at += size
        return matrix

    while at + 2 * up + down <= memory.numel():
        gate, other = take(up, rows, encoding), take(up, rows, encoding)
        found.append(Mlp(gate=gate, up=other, down=take(down, columns, below)))
    return [found[n : n + EXPERTS] for n in range(0, len(found) - EXPERTS + 1, EXPERTS)]


def product(compiled: Kernels, x: Tensor) -> Callable[[Matrix], Any]:
    """A product with the same activations."""
    return lambda matrix: compiled.linear(x, matrix)


def experts(compiled: Kernels, x: Tensor) -> Callable[[list[Mlp]], Any]:
    """Six experts' outputs."""
    return lambda mlps: compiled.experts([(mlp, None) for mlp in mlps], x, dtype=torch.float32)


def describe(name: str, way: Way, rates: list[tuple[float, float]]) -> dict[str, float]:
    """A line of the table: medians; shares of the floor that was measured beside."""
    floor = statistics.median(floor for floor, _ in rates)
    rate = statistics.median(rate for _, rate in rates)
    share = statistics.median(rate / floor for floor, rate in rates)
    milliseconds, gflops = way.one / rate * 1e3, way.flops * rate / way.one / 1e9
    say(
        f"{name:36} {rate / 1e9:7.2f} GB/s  {share:6.1%} of {floor / 1e9:6.2f}  {milliseconds:8.3f} ms  "
        f"{gflops:7.1f} GFLOP/s"
    )
    return {"gbps": rate / 1e9, "share": share, "floor_gbps": floor / 1e9, "ms": milliseconds, "gflops": gflops}


if __name__ == "__main__":
    main()
