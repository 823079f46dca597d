"""ggml's quantised blocks: sizes and numbers against ggml's own package, and products against the expanded numbers."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import gguf
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

import runner.fp8
from manifests.errors import IntegrityError, ToolkitError, UnsupportedModelError
from runner import kernels, quantised
from runner.attention import Attention, attend_absorbed
from runner.fp8 import Matrix, Mlp, check, dequantize, linear
from runner.kernels import Kernels
from runner.moe import _mlps
from runner.parameters import Parameters

COMPILED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K")
EXPANDED = tuple(sorted(set(quantised.BLOCKS) - set(COMPILED)))
SCALES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (), "IQ1_M": (),
}  # fmt: skip
"""Where the float16 numbers of a block are, if not at its begin alone."""

SHAPES = [(1, 1), (3, 1), (5, 2), (7, 3), (9, 13), (37, 5), (18, 28)]
"""Rows, and blocks of a row: with tiles of 4 and 16 rows, and pieces of 128 columns, that are not full."""

with_kernels = pytest.mark.skipif(not kernels.supported(), reason="the kernels were not built: there was no compiler")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=kernels.supported())
def compiled(request: pytest.FixtureRequest) -> Kernels:
    library = kernels.library()
    assert library is not None
    return Kernels(library, request.param)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def blocks_of(encoding: str, rows: int, blocks: int) -> Matrix:
    """Any bytes, but scales that are numbers, of either sign and many sizes; some blocks are of an extreme kind."""
    generator = torch.Generator().manual_seed(rows * 1000 + blocks)
    size = quantised.BLOCKS[encoding][1]
    found = torch.randint(0, 256, (rows * blocks, size), dtype=torch.uint8, generator=generator)
    for number, filled in ((1, 0x00), (2, 0xFF), (3, 0x0F), (4, 0xF0), (5, 0x80), (6, 0x7F)):
        found[number::11] = filled
    for at in SCALES.get(encoding, (0,)):
        scale = torch.randn(rows * blocks, generator=generator) * 10 ** torch.randint(
            -4, 1, (rows * blocks,), generator=generator
        )
        for number, extreme in ((1, 0.0), (7, 2.0**-24), (13, -(2.0**-24)), (19, 65504.0), (25, -0.0), (31, -65504.0)):
            scale[number::36] = extreme
        found[:, at : at + 2] = scale.half().view(torch.uint8).view(-1, 2)
    if encoding == "MXFP4":
        found[:, 0] = found[:, 0] % 20 + 118
    if encoding == "NVFP4":
        found[:, :4] %= 0x78
    if encoding == "IQ1_M":  # the sixteen bits of its scale are the upper nibbles of four pairs of bytes
        for at, nibble in zip((49, 51, 53, 55), (0x0, 0x2, 0x4, 0x2), strict=True):
            found[:, at] = found[:, at] & 0x0F | nibble << 4
    return Matrix(weight=found.view(rows, -1), scale=None, encoding=encoding, name="model.x.weight")


def expanded(matrix: Matrix) -> Tensor:
    """By ggml's package, whatever the runner makes of it."""
    return torch.from_numpy(gguf.quants.dequantize(matrix.weight.numpy().copy(), GGMLQuantizationType[matrix.encoding]))


@pytest.mark.parametrize("encoding", quantised.BLOCKS)
def test_sizes_of_blocks(encoding: str) -> None:
    assert quantised.BLOCKS[encoding] == GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]


def test_all_types_that_can_be_expanded_are_there() -> None:
    known = {one.name for one in gguf.quants._type_traits}
    assert set(quantised.BLOCKS) == known - {"BF16"}


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("encoding", quantised.BLOCKS)
def test_expanding_is_what_ggml_says(encoding: str) -> None:
    for rows, blocks in SHAPES:
        matrix = blocks_of(encoding, rows, blocks)
        assert matrix.shape == (rows, blocks * quantised.BLOCKS[encoding][0])
        found = dequantize(matrix)
        assert found.dtype == torch.float32
        assert found.shape == matrix.shape
        assert found.isfinite().all()
        assert torch.equal(found, expanded(matrix))
    assert found.unique().numel() > 30


def test_no_rows_and_no_columns() -> None:
    for rows, width in ((0, 144), (3, 0)):
        matrix = Matrix(weight=torch.empty(rows, width, dtype=torch.uint8), scale=None, encoding="Q4_K")
        assert dequantize(matrix).shape == (rows, width // 144 * 256)
        assert not linear(torch.ones(2, width // 144 * 256), matrix).any()


def in_full(matrix: Matrix) -> Matrix:
    return Matrix(weight=expanded(matrix), scale=None)


@with_kernels
@pytest.mark.parametrize("encoding", COMPILED)
@pytest.mark.parametrize("count", [1, 2, 3, 0])
def test_every_number_of_a_product_is_the_expanded_one(compiled: Kernels, encoding: str, count: int) -> None:
    """Picked out one column at a time, `count` of them at once or all: every bit of it."""
    for rows, blocks in ((9, 3), (37, 4)) if encoding[-1] == "K" else ((9, 7), (37, 30)):
        matrix = blocks_of(encoding, rows, blocks)
        expected = expanded(matrix)
        columns = matrix.shape[1]
        one = torch.eye(columns)
        found = torch.cat([compiled.linear(some, matrix) for some in one.split(count or columns)])
        assert torch.equal(found.T, expected)


@with_kernels
@pytest.mark.parametrize("encoding", COMPILED)
def test_a_product_is_the_one_with_expanded_numbers(compiled: Kernels, encoding: str) -> None:
    """The same bits as with the same numbers stored as float32; and what exact arithmetic gives."""
    torch.set_num_threads(1)
    for rows, blocks in SHAPES:
        matrix = blocks_of(encoding, rows, blocks)
        full = in_full(matrix)
        exact = full.weight.double()
        for count in (*range(1, 18), 50):
            x = seeded(count, matrix.shape[1], seed=count)
            y = compiled.linear(x, matrix)
            assert torch.equal(y, compiled.linear(x, full))
            bound = 1e-6 * (x.double().abs() @ exact.abs().T)
            assert ((y.double() - x.double() @ exact.T).abs() <= bound + 1e-30).all()


@with_kernels
@pytest.mark.parametrize("encoding", COMPILED)
def test_neither_rows_beside_nor_threads_change_a_bit(compiled: Kernels, encoding: str) -> None:
    matrix = blocks_of(encoding, 900, 2048 // quantised.BLOCKS[encoding][0])  # several chunks
    x = seeded(17, 2048)
    alone = torch.cat([compiled.linear(one, matrix) for one in x.split(1)])
    for size, threads in itertools.product((1, 2, 3, 4, 5, 6, 7, 16, 17), (1, 2)):
        torch.set_num_threads(threads)
        found = torch.cat([compiled.linear(some, matrix) for some in x.split(size)])
        assert torch.equal(found, alone), (size, threads)
    for begin, end in ((0, 1), (3, 19), (890, 900)):
        some = Matrix(weight=matrix.weight[begin:end], scale=None, encoding=encoding)
        for count in (1, 2, 3, 17):
            assert torch.equal(compiled.linear(x[:count], some), alone[:count, begin:end])


@with_kernels
@pytest.mark.parametrize("encoding", COMPILED)
def test_rounded_activations(compiled: Kernels, encoding: str) -> None:
    """bfloat16 has no products of its own with these: they are those of float32, whatever the count."""
    matrix = blocks_of(encoding, 37, 1024 // quantised.BLOCKS[encoding][0])
    for count in (1, 2, 8, 17, 50):
        x = seeded(count, 1024).bfloat16().float()
        assert torch.equal(compiled.linear(x, matrix, dtype=torch.bfloat16), compiled.linear(x, matrix))


def before_a_wall(weight: Tensor) -> Tensor:
    """The same bytes, ending where no memory follows: whoever reads on is killed."""
    size, page = weight.numel(), mmap.PAGESIZE
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory, room))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
    found = torch.frombuffer(memory, dtype=torch.uint8, offset=room - size, count=size)
    return found.copy_(weight.flatten()).view(weight.shape)


@with_kernels
@pytest.mark.parametrize("encoding", COMPILED)
def test_blocks_may_begin_anywhere_and_nothing_behind_them_is_read(compiled: Kernels, encoding: str) -> None:
    for rows, blocks in ((1, 1), (4, 3), (17, 5)):
        matrix = blocks_of(encoding, rows, blocks)
        walled = replace(matrix, weight=before_a_wall(matrix.weight))
        for count in (1, 2, 3, 5, 17):
            x = seeded(count, matrix.shape[1])
            assert torch.equal(compiled.linear(x, walled), compiled.linear(x, matrix))


def experts_of(encodings: Sequence[str], hidden: int, width: int) -> Mlp:
    """Gate, up and down of these encodings, with numbers of a common size."""
    made = []
    for encoding, rows, columns in zip(encodings, (width, width, hidden), (hidden, hidden, width), strict=True):
        some = gguf.quants.quantize(seeded(rows, columns).numpy() / 20, GGMLQuantizationType.Q8_0)
        matrix = Matrix(weight=torch.from_numpy(some), scale=None, encoding="Q8_0")
        if encoding != "Q8_0":
            matrix = blocks_of(encoding, rows, columns // quantised.BLOCKS[encoding][0])
            flat = matrix.weight.view(-1, quantised.BLOCKS[encoding][1])
            for at in SCALES.get(encoding, (0,)):
                flat[:, at : at + 2] = (seeded(len(flat), 1) / 5000).half().view(torch.uint8)
        made.append(matrix)
    return Mlp(gate=made[0], up=made[1], down=made[2])


MIXTURES = [("Q4_K", "Q4_K", "Q5_0"), ("Q4_K", "Q4_K", "Q6_K"), ("Q5_K", "Q8_0", "Q5_1"), ("IQ4_NL", "Q4_1", "Q4_0")]


@with_kernels
@pytest.mark.parametrize("encodings", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_several_types(compiled: Kernels, encodings: Sequence[str], dtype: torch.dtype) -> None:
    mlp = experts_of(encodings, 512, 768)
    full = Mlp(gate=in_full(mlp.gate), up=in_full(mlp.up), down=in_full(mlp.down))
    x, token = seeded(20, 512).to(dtype).float(), torch.tensor([3, 4, 9, 17])
    for some in (None, token, token[:1]):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found, expected = (compiled.experts([(one, some)], x, dtype=dtype)[0] for one in (mlp, full))
            assert found.isfinite().all()
            assert found.abs().max() > 1e-3
            assert torch.equal(found, expected)


@with_kernels
@pytest.mark.parametrize("encoding", COMPILED)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_attention_reads_quantised_projections(compiled: Kernels, encoding: str, tokens: int) -> None:
    """Its products with rows and with columns of kv_b: the bits of the expanded matrix."""
    heads, nope, rotary, value = 3, 24, 8, 40
    latent = 512 if encoding[-1] == "K" else 416
    kv_b = blocks_of(encoding, heads * (nope + value), latent // quantised.BLOCKS[encoding][0])
    for at in SCALES.get(encoding, (0,)):
        flat = kv_b.weight.view(-1, quantised.BLOCKS[encoding][1])
        flat[:, at : at + 2] = (seeded(len(flat), 1) / 1000).half().view(torch.uint8)
    q, c, k_pe = seeded(tokens, heads, nope + rotary), seeded(tokens + 70, latent), seeded(tokens + 70, rotary)
    angle = seeded(tokens, rotary // 2)
    found, expected = (
        compiled.attend(q, (angle.cos(), angle.sin()), c, k_pe, one, scale=0.1, dtype=torch.float32)
        for one in (kv_b, in_full(kv_b))
    )
    assert found.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("encoding", ["Q4_K", "Q5_0", *EXPANDED])
def test_products_of_every_type_everywhere(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr(runner.fp8, "_EXPANDED_ELEMENTS", 1 << 16)  # several parts
    matrix = blocks_of(encoding, 150, 1024 // quantised.BLOCKS[encoding][0])
    exact, x = expanded(matrix).double(), seeded(5, 1024)
    y = linear(x, matrix)
    bound = 1e-6 * (x.double().abs() @ exact.abs().T)
    assert ((y.double() - x.double() @ exact.T).abs() <= bound + 1e-30).all()
    if kernels.active() is not None:
        assert torch.equal(linear(x[:1], matrix), y[:1])


@pytest.mark.usefixtures("every_way")
def test_an_expert_of_a_rare_type_changes_no_bit_of_one_beside_it() -> None:
    rare, common = experts_of(("Q2_K", "Q2_K", "Q3_K"), 512, 256), experts_of(("Q4_K", "Q4_K", "Q6_K"), 512, 256)
    x, token = seeded(4, 512), torch.tensor([1, 2])
    alone = [_mlps([one], x, torch.float32)[0] for one in ((common, token), (rare, None), (common, None))]
    together = _mlps([(common, token), (rare, None), (common, None)], x, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    full = [Mlp(gate=in_full(one.gate), up=in_full(one.up), down=in_full(one.down)) for one in (common, rare)]
    for one, some, y in ((full[0], x[token], together[0]), (full[1], x, together[1])):
        expected = _mlps([(one, None)], some, torch.float32)[0]
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("encoding", ["Q8_0", "Q3_K", "Q4_K"])
def test_a_layer_of_attention_with_any_type(encoding: str) -> None:
    heads, nope, rotary, value, latent = 2, 56, 8, 72, 512
    kv_b = experts_of((encoding,) * 3, latent, heads * (nope + value)).gate  # 256 rows
    x, q = SimpleNamespace(cos=torch.ones(3, 4), sin=torch.zeros(3, 4)), seeded(3, heads, nope + rotary)
    c, k_pe = seeded(9, latent), seeded(9, rotary)
    attention = Attention.__new__(Attention)
    attention._config = SimpleNamespace(  # type: ignore[assignment]
        num_attention_heads=heads, qk_nope_head_dim=nope, v_head_dim=value, kv_lora_rank=latent
    )
    attention._matrices, attention._scale, attention._dtype = {"kv_b_proj": kv_b}, 0.1, torch.float32
    found = attention._attend(q, x, c, k_pe)  # type: ignore[arg-type]
    plain = attend_absorbed(q[..., :nope], q[..., nope:], c, k_pe, in_full(kv_b), scale=0.1)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_what_is_no_matrix_of_blocks_is_refused_by_name() -> None:
    bytes_of_one = torch.zeros(3, 145, dtype=torch.uint8)
    broken = Matrix(weight=bytes_of_one, scale=None, encoding="Q4_K", name="here is")
    unknown = replace(broken, encoding="Q4_Z")
    floats = replace(broken, weight=torch.zeros(3, 144))
    for use in (check, dequantize, lambda matrix: linear(torch.ones(1, 256), matrix)):
        with pytest.raises(IntegrityError, match=r"here is .*rows of 145 bytes.*Q4_K blocks of 144"):
            use(broken)
        with pytest.raises(IntegrityError, match=r"here is .*Q4_K.*float32"):
            use(floats)
        with pytest.raises(UnsupportedModelError, match=r"here is is encoded as Q4_Z; the runner reads Q4_0, "):
            use(unknown)


def test_shapes_are_those_of_the_numbers() -> None:
    matrix = blocks_of("Q4_K", 10, 2)
    store = SimpleNamespace(matrix=lambda _: matrix)
    parameters = Parameters(store, None)  # type: ignore[arg-type]
    assert parameters.matrix("model.x", 10, 512).shape == (10, 512)
    with pytest.raises(IntegrityError, match=r"has shape \[10, 512\]"):
        parameters.matrix("model.x", 10, 288)


def test_without_the_package_only_the_compiled_types_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ToolkitError, match=r"a\.weight is encoded as Q2_K.*pip install 'expert-reshard\[gguf\]'"):
        linear(torch.ones(1, 256), replace(blocks_of("Q2_K", 2, 1), name="a.weight"))
    if kernels.active() is not None:
        for encoding in COMPILED:
            matrix = blocks_of(encoding, 2, 256 // quantised.BLOCKS[encoding][0])
            assert linear(torch.ones(1, 256), matrix).shape == (1, 2)
            assert dequantize(matrix).shape == (2, 256)


@with_kernels
def test_many_rows_are_expanded_in_chunks_whatever_the_threads() -> None:
    matrix = blocks_of("Q4_K", 5000, 3)  # 2 MB
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(dequantize(matrix), expanded(matrix))
