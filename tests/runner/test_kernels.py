"""The compiled products: every stored number, every edge, and bits that depend on nothing but the numbers."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runner import kernels
from runner.fp8 import Matrix, Mlp, dequantize
from runner.kernels import Kernels, Part

BLOCK = 128
ROUNDED = (torch.float32, torch.bfloat16)
"""What activations are rounded to; bfloat16 has products of its own on some processors, from three tokens on."""
PLAIN = (torch.bfloat16, torch.float16, torch.float32)
WITH_FMA = tuple(variant for variant in kernels.supported() if variant != "portable")

pytestmark = pytest.mark.skipif(not kernels.supported(), reason="the kernels were not built: there was no compiler")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kernels_of(variant: str) -> Kernels:
    library = kernels.library()
    assert library is not None
    return Kernels(library, variant)


@pytest.fixture(params=kernels.supported())
def compiled(request: pytest.FixtureRequest) -> Kernels:
    return kernels_of(request.param)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def fp8(rows: int, columns: int, *, block: tuple[int, int] = (BLOCK, BLOCK)) -> Matrix:
    """Any codes but NaN, and scales that differ, so that a neighbour's would show."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    code = torch.randint(0, 127, (rows, columns), generator=generator)
    code += 128 * torch.randint(0, 2, (rows, columns), generator=generator)
    scale = 10 ** (torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) - 1)
    return Matrix(weight=code.to(torch.uint8).view(torch.float8_e4m3fn), scale=scale, block=block)


def moved(tensor: Tensor, offset: int) -> Tensor:
    """The same at an address that is no multiple of its elements, as in the published shards."""
    raw = tensor.contiguous().view(torch.uint8).flatten()
    buffer = bytearray(offset) + bytearray(raw.tolist())
    return torch.frombuffer(buffer, dtype=tensor.dtype, offset=offset, count=tensor.numel()).view(tensor.shape)


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of a dtype."""
    if dtype is torch.float8_e4m3fn:
        return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).view(2, 128)
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).view(512, 128)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("count", "rounded"),
    [(1, torch.float32), (3, torch.float32)] + [(count, torch.bfloat16) for count in (3, 4, 5, 6, 8, 9)],
)
def test_every_bit_pattern(compiled: Kernels, dtype: torch.dtype, count: int, rounded: torch.dtype) -> None:
    """Picked out one column at a time: exact, signs and subnormals and all, and NaN stays NaN."""
    weight = all_numbers(dtype)
    expected = weight.to(torch.float32)
    scale = torch.tensor([[0.5]]) if dtype is torch.float8_e4m3fn else None
    if scale is not None:
        expected = expected * 0.5
    for column in range(128):
        # The others are taken with 0: where one of them is no number, the sum is none either.
        is_number = weight.to(torch.float32).isfinite()
        alone = torch.where(is_number, weight.to(torch.float32), 0).to(dtype)
        alone[:, column] = weight[:, column]
        x = torch.zeros(count, 128)
        x[:, column] = 1
        y = compiled.linear(x, Matrix(weight=alone, scale=scale), dtype=rounded)
        for row in y:
            assert torch.equal(row.isnan(), expected[:, column].isnan())
            kept = ~row.isnan() & (expected[:, column].abs() >= torch.finfo(torch.float32).tiny)
            assert torch.equal(row[kept], expected[:, column][kept])
            # bfloat16 has float32's range: its subnormals are zeros here.
            assert (row[~kept].nan_to_num(0) == 0).all()


def test_a_number_that_is_none_spoils_its_row_alone(compiled: Kernels) -> None:
    for code, column in itertools.product((0x7F, 0xFF), (3, 130, 255, 299)):
        matrix = fp8(20, 300)
        matrix.weight.view(torch.uint8)[7, column] = code
        for count, dtype in itertools.product((1, 2, 3, 4, 5, 7, 8, 14), ROUNDED):
            y = compiled.linear(seeded(count, 300).to(dtype).float(), matrix, dtype=dtype)
            assert y.isnan().nonzero()[:, 1].unique().tolist() == [7]
            assert (compiled.linear(torch.zeros(count, 300), matrix, dtype=dtype)[:, 7]).isnan().all()


@pytest.mark.parametrize("dtype", ROUNDED)
def test_an_activation_that_is_none_spoils_its_token_alone(compiled: Kernels, dtype: torch.dtype) -> None:
    for count, number, column in itertools.product((4, 6, 8, 14), (torch.nan, torch.inf), (0, 129, 299)):
        x = seeded(count, 300).to(dtype).float()
        x[3, column] = number
        y = compiled.linear(x, Matrix(weight=torch.ones(40, 300).bfloat16(), scale=None), dtype=dtype)
        assert (~y.isfinite()).all(dim=1).nonzero().tolist() == [[3]]
        assert y[3].isnan().all() == (number != torch.inf)
        assert y.isfinite().sum() == (count - 1) * 40


SHAPES = [
    (1, 1), (1, 300), (300, 1), (16, 128), (129, 127), (127, 129), (5, 16), (5, 17), (3, 31), (7, 33), (64, 7168),
    (700, 96), (2, 15), (37, 1101),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(
    "kind", ["fp8", "bfloat16", "float16", "float32", "narrow blocks", "wide blocks", "double blocks"]
)
def test_the_product_is_the_one_of_exact_arithmetic(compiled: Kernels, rows: int, columns: int, kind: str) -> None:
    if kind == "fp8":
        matrix = fp8(rows, columns)
    elif kind == "narrow blocks":
        matrix = fp8(rows, columns, block=(3, 20))
    elif kind.endswith("blocks"):
        matrix = fp8(rows, columns, block=(50, 200) if kind == "wide blocks" else (50, 256))
    else:
        matrix = Matrix(weight=seeded(rows, columns).to(getattr(torch, kind)), scale=None)
    exact = dequantize(matrix).double()
    for count in (1, 2, 3, 4, 5, 33):
        x = seeded(count, columns, seed=count)
        y = compiled.linear(x, matrix)
        # What a sum can lose depends on the size of what is added.
        bound = 1e-6 * (x.double().abs() @ exact.abs().T)
        assert ((y.double() - x.double() @ exact.T).abs() <= bound + 1e-30).all()


def rounding_bound(x: Tensor, exact: Tensor) -> Tensor:
    """What a sum can lose with activations of bfloat16, whatever the order.

    Products with e4m3 or bfloat16 are exact in float32. A piece of 128 columns rounds once for each product at most,
    and once when it is added to the others; the scale was rounded into ``exact``.
    """
    columns = x.shape[1]
    roundings = min(columns, 128) + -(-columns // 128) + 1
    return 1.001 * roundings * 2**-24 * (x.double().abs() @ exact.abs().T)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "float16", "narrow blocks", "low blocks", "double blocks"])
def test_the_product_of_rounded_activations_is_exact_too(compiled: Kernels, rows: int, columns: int, kind: str) -> None:
    if kind.endswith("16"):
        matrix = Matrix(weight=seeded(rows, columns).to(getattr(torch, kind)), scale=None)
    else:
        block = {"fp8": (128, 128), "narrow blocks": (3, 20), "low blocks": (5, 128), "double blocks": (50, 256)}[kind]
        matrix = fp8(rows, columns, block=block)
    exact = dequantize(matrix).double()
    for count in (*range(1, 21), 33, 48, 64, 200):
        x = seeded(count, columns, seed=count).bfloat16().float()
        y = compiled.linear(x, matrix, dtype=torch.bfloat16)
        assert ((y.double() - x.double() @ exact.T).abs() <= rounding_bound(x, exact) + 1e-30).all()


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("columns", [64, 128, 129, 300, 3000])
def test_each_column_meets_its_own_activation(compiled: Kernels, columns: int, kind: str) -> None:
    """Products of one column each, which are exact: the order of what is packed, in every tile of rows and tokens."""
    matrix = fp8(40, columns)
    if kind == "bfloat16":
        matrix = Matrix(weight=seeded(40, columns).bfloat16(), scale=None)
    exact = dequantize(matrix)
    for count in range(1, 21):
        x = torch.zeros(count, columns)
        at = (torch.arange(count) * 977 + 5 * count) % columns
        x[torch.arange(count), at] = 2.0 ** torch.arange(count)
        expected = (exact[:, at] * 2.0 ** torch.arange(count)).T
        assert torch.equal(compiled.linear(x, matrix, dtype=torch.bfloat16), expected), count


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8, 9, 16])
def test_a_row_gets_the_same_whatever_rows_are_beside_it(compiled: Kernels, count: int) -> None:
    """And so whatever tile of rows it is in."""
    x = seeded(count, 1100).bfloat16().float()
    for matrix in (fp8(37, 1100, block=(1, 128)), Matrix(weight=seeded(37, 1100).bfloat16(), scale=None)):
        whole = compiled.linear(x, matrix, dtype=torch.bfloat16)
        for begin, end in ((0, 1), (5, 8), (3, 19), (20, 37)):
            scale = None if matrix.scale is None else matrix.scale[begin:end]
            some = Matrix(weight=matrix.weight[begin:end], scale=scale, block=matrix.block)
            assert torch.equal(compiled.linear(x, some, dtype=torch.bfloat16), whole[:, begin:end])


def multiplies_bfloat16(compiled: Kernels) -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return compiled.variant == "avx512-vbmi" and "avx512_bf16" in flags


def test_rounded_activations_have_a_product_of_their_own_for_many_tokens(compiled: Kernels) -> None:
    """And the one of float32 for few tokens, and where the processor has none."""
    matrices = (fp8(300, 1100), Matrix(weight=seeded(300, 1100).bfloat16(), scale=None))
    for matrix, count in itertools.product(matrices, (1, 2, 3, 4, 8, 9, 50)):
        x = seeded(count, 1100).bfloat16().float()
        same = torch.equal(compiled.linear(x, matrix, dtype=torch.bfloat16), compiled.linear(x, matrix))
        assert same != (multiplies_bfloat16(compiled) and count > 2)


def test_one_row_at_a_time_gives_the_same_bits(compiled: Kernels) -> None:
    """So neither the tokens beside it nor the size of a chunk of the prompt changes what a token gets."""
    for matrix in (
        fp8(203, 1100),
        fp8(50, 700, block=(7, 200)),
        *(Matrix(weight=seeded(77, 300).to(dtype), scale=None) for dtype in PLAIN),
    ):
        x = seeded(100, matrix.weight.shape[1])
        alone = torch.cat([compiled.linear(one, matrix) for one in x.split(1)])
        for size in (2, 3, 4, 5, 6, 7, 8, 11, 31, 47, 48, 49, 100):
            assert torch.equal(torch.cat([compiled.linear(some, matrix) for some in x.split(size)]), alone), size


def test_threads_change_no_bit(compiled: Kernels) -> None:
    matrix = fp8(3000, 1100)  # several chunks
    rounded = [(count, torch.bfloat16) for count in (*range(2, 21), 48, 64, 250)]
    for count, dtype in ((1, torch.float32), (6, torch.float32), *rounded):
        x, found = seeded(count, 1100).to(dtype).float(), []
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            found.append(compiled.linear(x, matrix, dtype=dtype))
        assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.skipif(len(WITH_FMA) < 2, reason="this processor has one instruction set with fused multiply-add")
def test_instruction_sets_with_one_rounding_give_the_same_bits() -> None:
    for matrix in (
        fp8(203, 1100),
        fp8(50, 77, block=(3, 20)),
        fp8(50, 700, block=(7, 200)),
        *(Matrix(weight=seeded(77, 300).to(dtype), scale=None) for dtype in PLAIN),
    ):
        for count in (1, 2, 3, 6, 50):
            x = seeded(count, matrix.weight.shape[1])
            first, *others = (kernels_of(variant).linear(x, matrix) for variant in WITH_FMA)
            assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 63])
def test_weights_and_scales_may_begin_anywhere(compiled: Kernels, offset: int) -> None:
    matrix = fp8(40, 300)
    assert matrix.scale is not None
    odd = Matrix(weight=moved(matrix.weight, offset), scale=moved(matrix.scale, offset))
    plain = Matrix(weight=seeded(40, 300).bfloat16(), scale=None)
    odd_plain = Matrix(weight=moved(plain.weight, offset), scale=None)
    for count, dtype in itertools.product((1, 4, 5, 8, 9), ROUNDED):
        x = seeded(count, 300).to(dtype).float()
        for moved_one, one in ((odd, matrix), (odd_plain, plain)):
            assert torch.equal(compiled.linear(x, moved_one, dtype=dtype), compiled.linear(x, one, dtype=dtype))


@pytest.mark.parametrize("dtype", ROUNDED)
def test_nothing_at_all(compiled: Kernels, dtype: torch.dtype) -> None:
    matrix = fp8(40, 300)
    assert compiled.linear(torch.empty(0, 300), matrix, dtype=dtype).shape == (0, 40)
    for count in (2, 5, 9):
        empty = Matrix(weight=torch.empty(0, 300).to(dtype), scale=None)
        assert compiled.linear(torch.zeros(count, 300), empty, dtype=dtype).shape == (count, 0)
        thin = Matrix(weight=torch.empty(5, 0).to(dtype), scale=None)
        assert torch.equal(compiled.linear(torch.empty(count, 0), thin, dtype=dtype), torch.zeros(count, 5))


def test_no_byte_beside_the_matrix_counts(compiled: Kernels) -> None:
    """Numbers that are none lie around the weights, the scales and the activations."""
    rows, columns = 9, 37
    matrix = fp8(rows, columns)
    weight = torch.full((rows + 4, columns), 0x7F, dtype=torch.uint8)
    weight[2:-2] = matrix.weight.view(torch.uint8)
    x = torch.full((12, columns), torch.nan)
    x[1:-1] = seeded(10, columns).bfloat16()
    inner = Matrix(weight=weight.view(torch.float8_e4m3fn)[2:-2], scale=matrix.scale)
    ends = (
        (2, torch.float32),
        (4, torch.float32),
        (4, torch.bfloat16),
        (5, torch.bfloat16),
        (8, torch.bfloat16),
        (11, torch.bfloat16),
    )
    for end, dtype in ends:
        some = x[1:end]
        y = compiled.linear(some, inner, dtype=dtype)
        assert y.isfinite().all()
        assert torch.equal(y, compiled.linear(some.clone(), matrix, dtype=dtype))


def before_a_wall(tensor: Tensor) -> Tensor:
    """The same, ending where no memory follows: whoever reads on is killed."""
    raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
    page = mmap.PAGESIZE
    size = -(-len(raw) // page) * page
    memory = mmap.mmap(-1, size + page)
    memory[size - len(raw) : size] = raw
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory, size))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=size - len(raw), count=tensor.numel()).view(tensor.shape)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9])
def test_nothing_behind_the_end_is_read(compiled: Kernels, count: int, dtype: torch.dtype) -> None:
    for matrix in (fp8(9, 137), fp8(16, 64), fp8(17, 601), Matrix(weight=seeded(5, 45).bfloat16(), scale=None)):
        scale = None if matrix.scale is None else before_a_wall(matrix.scale)
        x = seeded(count, matrix.weight.shape[1]).to(dtype).float()
        walled = Matrix(weight=before_a_wall(matrix.weight), scale=scale)
        y = compiled.linear(before_a_wall(x), walled, dtype=dtype)
        assert torch.equal(y, compiled.linear(x, matrix, dtype=dtype))


@pytest.mark.skipif(len(WITH_FMA) < 1, reason="this processor has no fused multiply-add")
def test_the_instruction_set_that_was_asked_for_is_the_one_that_works() -> None:
    """One with two roundings gives other bits; and each is there again when it is asked again."""
    matrix, x = fp8(50, 900), seeded(1, 900)
    portable, fused = kernels_of("portable"), kernels_of(WITH_FMA[0])
    first, second = portable.linear(x, matrix), fused.linear(x, matrix)
    assert not torch.equal(first, second)
    assert torch.equal(portable.linear(x, matrix), first)


@pytest.mark.skipif(len(WITH_FMA) < 1, reason="only of this processor it is known how")
def test_denormal_numbers_are_zeros_inside_and_numbers_outside(compiled: Kernels) -> None:
    tiny = Matrix(weight=torch.full((700, 700), 2.0**-100).bfloat16(), scale=None)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = compiled.linear(torch.full((1, 700), 2.0**-40), tiny)
        assert y.count_nonzero() == 0
        assert torch.full((3,), 2.0**-140).mul(1.0).count_nonzero() == 3


def test_reading_reads_everything_once(compiled: Kernels) -> None:
    numbers = torch.randint(-(1 << 62), 1 << 62, (400_000,), generator=torch.Generator().manual_seed(0))
    for memory in (numbers, numbers[:8], numbers[3:100_003]):
        assert compiled.read(memory) == int(memory.sum()) % (1 << 64)
    assert compiled.read(numbers[:7]) == 0


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def summed(compiled: Kernels, experts: list[tuple[Mlp, Part]], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted sum of MLPs; each part's y is not yet known."""
    found = compiled.experts([(mlp, part.token) for mlp, part in experts], x, dtype=dtype)
    out = torch.zeros_like(x)
    compiled.add([replace(part, y=y) for (_, part), y in zip(experts, found, strict=True)], out)
    return out


def experts_of(hidden: int, widths: tuple[int, ...]) -> list[tuple[Matrix, Matrix, Matrix]]:
    return [(fp8(width, hidden), fp8(width, hidden), fp8(hidden, width)) for width in widths]


@pytest.mark.parametrize("tokens", [1, 2, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(compiled: Kernels, tokens: int, dtype: torch.dtype) -> None:
    hidden = 200
    generator = torch.Generator().manual_seed(tokens)
    x = (seeded(tokens, hidden) / 20).to(dtype).float()
    calls, expected, size = [], torch.zeros(tokens, hidden, dtype=torch.float64), 0.0
    for number, (gate, up, down) in enumerate(experts_of(hidden, (40, 130, 40, 8))):
        chosen = torch.rand(tokens, generator=generator) < 0.6
        token = chosen.nonzero()[:, 0] if number < 3 else None
        weight = torch.rand(int(chosen.sum()), generator=generator) if number < 3 else None
        calls.append((Mlp(gate=gate, up=up, down=down), Part(y=x, token=token, weight=weight)))
        some = x if token is None else x[token]
        h = silu(some.double() @ dequantize(gate).double().T) * (some.double() @ dequantize(up).double().T)
        y = h @ dequantize(down).double().T
        if token is None:
            expected += y
        elif weight is not None:
            expected.index_add_(0, token, y * weight.double().unsqueeze(1))
        size = max(size, *y.abs().flatten().tolist(), 0.0)
    found = summed(compiled, calls, x, dtype)
    bound = (3e-6 if dtype is torch.float32 else 2e-2) * size
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
    if dtype is torch.bfloat16:
        assert not torch.equal(found, summed(compiled, calls, x, torch.float32))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(summed(compiled, calls, x, dtype), found)


def test_each_token_gets_the_same_beside_others(compiled: Kernels) -> None:
    ((gate, up, down),) = experts_of(300, (70,))
    mlp, x = Mlp(gate=gate, up=up, down=down), seeded(40, 300) / 20
    alone = torch.cat([compiled.experts([(mlp, None)], one, dtype=torch.float32)[0] for one in x.split(1)])
    assert torch.equal(compiled.experts([(mlp, None)], x, dtype=torch.float32)[0], alone)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_rows_that_are_picked_are_as_good_as_copies(compiled: Kernels, dtype: torch.dtype) -> None:
    x = (seeded(30, 300) / 20).to(dtype).float()
    mlps = [Mlp(gate=gate, up=up, down=down) for gate, up, down in experts_of(300, (70, 200, 8))]
    tokens = [torch.tensor([3, 4, 9, 17, 29]), torch.tensor([5]), torch.arange(0, 30, 2)]
    found = compiled.experts(list(zip(mlps, tokens, strict=True)), x, dtype=dtype)
    for mlp, token, y in zip(mlps, tokens, found, strict=True):
        assert torch.equal(y, compiled.experts([(mlp, None)], x[token], dtype=dtype)[0])


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("count", [4, 8, 20])
def test_an_expert_is_made_of_its_products(compiled: Kernels, count: int, dtype: torch.dtype) -> None:
    ((gate, up, down),) = experts_of(300, (200,))
    x = (seeded(count, 300) / 20).to(dtype).float()
    (found,) = compiled.experts([(Mlp(gate=gate, up=up, down=down), None)], x, dtype=dtype)
    h = silu(compiled.linear(x, gate, dtype=dtype)) * compiled.linear(x, up, dtype=dtype)
    h = h.to(dtype).float()
    # Where exp differs in its last bit, h may be rounded to the next number: half a unit of bfloat16 at most, of a few.
    bound = 1e-6 if dtype is torch.float32 else 2**-13
    size = h.abs() @ dequantize(down).abs().T
    assert ((found - compiled.linear(h, down, dtype=dtype)).abs() <= bound * size + 1e-30).all()


@pytest.mark.parametrize("count", [4, 20])
def test_gate_and_up_may_be_of_two_kinds(compiled: Kernels, count: int) -> None:
    """Their activations are not packed alike."""
    ((gate, up, down),) = experts_of(300, (200,))
    plain = Matrix(weight=dequantize(up).bfloat16(), scale=None)
    x = (seeded(count, 300) / 20).bfloat16().float()
    for pair in ((gate, plain), (plain, gate)):
        (found,) = compiled.experts([(Mlp(gate=pair[0], up=pair[1], down=down), None)], x, dtype=torch.bfloat16)
        h = silu(x @ dequantize(pair[0]).T) * (x @ dequantize(pair[1]).T)
        expected = h.bfloat16().float() @ dequantize(down).T
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * float(expected.abs().max()))


def test_parts_are_added_in_their_order(compiled: Kernels) -> None:
    """1e8, 1 and -1e8 add up to 0 in this order and to 1 in another."""
    parts = [
        Part(y=torch.full((1, 700), value / 2), token=torch.tensor([1]), weight=torch.tensor([2.0]))
        for value in (1e8, 1.0, -1e8)
    ]
    out = torch.zeros(2, 700)
    compiled.add(parts, out)
    assert not out.any()
    compiled.add([parts[0], parts[2], parts[1]], out)
    assert torch.equal(out, torch.tensor([[0.0], [1.0]]).expand(2, 700))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(compiled: Kernels) -> None:
    torch.set_num_threads(3)
    matrix, x = fp8(3000, 1100), seeded(1, 1100)
    expected = compiled.linear(x, matrix)
    child = os.fork()
    if child == 0:
        is_right = torch.equal(kernels_of(compiled.variant).linear(x, matrix), expected)
        os._exit(0 if is_right and len(os.listdir("/proc/self/task")) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(compiled.linear(x, matrix), expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_within_a_product_of_another_thread(compiled: Kernels) -> None:
    """It has no such thread, so nobody would ever end that product there."""
    ((gate, up, down),) = experts_of(1024, (1024,))
    work, x, is_over = [(Mlp(gate=gate, up=up, down=down), None)], seeded(40, 1024), threading.Event()
    compiled.experts(work, x, dtype=torch.float32)

    def multiply() -> None:
        while not is_over.is_set():
            compiled.experts(work, x, dtype=torch.float32)

    thread = threading.Thread(target=multiply)
    thread.start()
    try:
        for _ in range(3):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                compiled.experts(work, x[:1], dtype=torch.float32)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        is_over.set()
        thread.join()


def test_the_best_is_taken() -> None:
    chosen = kernels.active()
    assert chosen is not None
    assert chosen.variant == kernels.supported()[-1]
    assert kernels.supported()[0] == "portable"


def test_a_library_of_another_machine_is_as_good_as_none(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_native.so").write_bytes(b"\x7fELF of something else")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    assert kernels.library.__wrapped__() is None


def test_what_is_kept_of_a_matrix_is_not_another_ones(compiled: Kernels) -> None:
    """A matrix that was multiplied by, with other weights or another block; one whose rows lie apart is read anew."""
    x = seeded(1, 256)
    first = Matrix(weight=seeded(8, 256), scale=None)
    compiled.linear(x, first)
    second = replace(first, weight=seeded(8, 256, seed=1))
    assert torch.equal(compiled.linear(x, second), compiled.linear(x, Matrix(weight=second.weight, scale=None)))
    apart = Matrix(weight=seeded(8, 512)[:, :256], scale=None)
    compiled.linear(x, apart)
    apart.weight.mul_(2)
    assert torch.equal(compiled.linear(x, apart), compiled.linear(x, Matrix(weight=apart.weight, scale=None)))
