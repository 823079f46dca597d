"""Compiled attention, norms and routing: exact, and of every token the same bits whatever comes with it."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runner import kernels
from runner.attention import attend_absorbed
from runner.config import ModelConfig
from runner.fp8 import Matrix, dequantize
from runner.kernels import Kernels
from runner.norm import rms_norm
from runner.rope import Rotation, rotate
from runner.router import route_compiled, route_greedy, route_noaux_tc

WITH_FMA = tuple(variant for variant in kernels.supported() if variant != "portable")
SPAN = 1024
"""Positions of one call in runner/native/attention.h."""

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


class Case:
    """Queries, a cache and kv_b; sizes are (heads, nope, rotary, value, latent)."""

    def __init__(
        self,
        tokens: int,
        cached: int,
        sizes: tuple[int, ...] = (5, 24, 8, 20, 28),
        kind: str = "fp8",
        spread: float = 1,
    ) -> None:
        self.heads, self.nope, rotary, value, latent = sizes
        self.q = seeded(tokens, self.heads, self.nope + rotary) * spread
        self.c, self.k_pe = seeded(cached, latent), seeded(cached, rotary)
        angle = 7 * torch.rand(tokens, rotary // 2, generator=torch.Generator().manual_seed(tokens))
        self.rotation = Rotation(cos=1.3 * angle.cos(), sin=1.3 * angle.sin())
        self.kv_b = self._weights(self.heads * (self.nope + value), latent, kind)
        self.scale = (self.nope + rotary) ** -0.5

    @staticmethod
    def _weights(rows: int, latent: int, kind: str) -> Matrix:
        weight = seeded(rows, latent) * latent**-0.5
        if not kind.startswith("fp8"):
            return Matrix(weight=weight.to(getattr(torch, kind)), scale=None)
        block = (3, 20) if kind == "fp8 in narrow blocks" else (128, 128)
        grid = -(-rows // block[0]), -(-latent // block[1])
        scale = 10 ** (torch.rand(grid, generator=torch.Generator().manual_seed(rows)) - 2)
        return Matrix(weight=(weight * 30).to(torch.float8_e4m3fn), scale=scale, block=block)

    def run(self, by: Kernels, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.part(by, 0, len(self.q), dtype)

    def part(self, by: Kernels, begin: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some of the tokens, with no later position in the cache."""
        seen = len(self.c) - len(self.q) + end
        turn = (self.rotation.cos[begin:end], self.rotation.sin[begin:end])
        cache = (self.c[:seen], self.k_pe[:seen])
        return by.attend(self.q[begin:end], turn, *cache, self.kv_b, scale=self.scale, dtype=dtype)

    def twin(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """By torch."""
        query = self.q[..., : self.nope], rotate(self.q[..., self.nope :], self.rotation)
        return attend_absorbed(*query, self.c, self.k_pe, self.kv_b, scale=self.scale, dtype=dtype)


KINDS = ["fp8", "fp8 in narrow blocks", "bfloat16", "float16", "float32"]
SIZES = [(5, 24, 8, 20, 28), (33, 16, 4, 7, 40), (1, 1, 2, 1, 1), (3, 130, 64, 70, 300)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("tokens", "cached"), [(1, 1), (1, 30), (9, 9), (3, 100)])
def test_it_equals_plain_attention(
    compiled: Kernels, reference: SimpleNamespace, sizes: tuple[int, ...], tokens: int, cached: int, kind: str
) -> None:
    case = Case(tokens, cached, sizes, kind)
    q_pe = rotate(case.q[..., case.nope :], case.rotation)
    plain = (case.q[..., : case.nope], q_pe, case.c, case.k_pe, dequantize(case.kv_b))
    if sizes[0] * tokens * cached > 2000:
        expected = case.twin().double()
    else:
        expected = reference.attention.attend_plain(*plain, scale=case.scale)
    found = case.run(compiled).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("tokens", "cached"), [(1, SPAN), (1, SPAN + 1), (3, SPAN + 1), (1, 5 * SPAN + 70), (40, 40), (70, SPAN + 20)]
)
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_long_texts_and_many_tokens_equal_torch(compiled: Kernels, tokens: int, cached: int, spread: float) -> None:
    """A spread of 0 weighs every position alike, one of 30 knows almost only the best of them."""
    case = Case(tokens, cached, spread=spread)
    torch.testing.assert_close(case.run(compiled), case.twin(), rtol=0, atol=2e-5 if spread > 1 else 3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_gets_the_same_bits_alone(compiled: Kernels, kind: str) -> None:
    for case in (Case(70, 70, kind=kind), Case(45, SPAN + 15, kind=kind), Case(9, 90, SIZES[3], kind)):
        tokens = len(case.q)
        whole = case.run(compiled)
        for size in (1, 2, 7, 33):
            parts = [case.part(compiled, at, min(at + size, tokens)) for at in range(0, tokens, size)]
            assert torch.equal(torch.cat(parts), whole), size


def test_threads_change_no_bit(compiled: Kernels) -> None:
    for case in (Case(1, 3000, (40, 64, 8, 64, 96)), Case(33, 80, (40, 64, 8, 64, 96))):
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(case.run(compiled))
        assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.skipif(len(WITH_FMA) < 2, reason="this processor has one instruction set with fused multiply-add")
def test_instruction_sets_with_one_rounding_give_the_same_bits() -> None:
    for kind in KINDS:
        for case in (Case(1, 1100, kind=kind), Case(9, 90, SIZES[3], kind)):
            first, *others = (case.run(kernels_of(variant)) for variant in WITH_FMA)
            assert all(torch.equal(first, other) for other in others)


def test_weights_are_exponentials_to_the_last_digits(compiled: Kernels) -> None:
    """Two positions, of which the second scores less by as much as the head's query is: its weight is a sigmoid."""
    less = torch.cat((torch.linspace(0, 20, 3001), torch.linspace(20, 85, 1000)))
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(
        len(less), 1
    )  # a key of the first number, a value of the other
    q = torch.stack((less, torch.zeros_like(less), torch.zeros_like(less)), -1).unsqueeze(0)
    turn = (torch.ones(1, 1), torch.zeros(1, 1))
    c, k_pe = torch.tensor([[0.0, 0.0], [-1.0, 1.0]]), torch.zeros(2, 2)
    kv_b = Matrix(weight=weight, scale=None)
    found = compiled.attend(q, turn, c, k_pe, kv_b, scale=1.0, dtype=torch.float32)[0, :, 0]
    torch.testing.assert_close(found.double(), (-less.double()).sigmoid(), rtol=5e-7, atol=0)


def test_later_positions_are_not_looked_at(compiled: Kernels) -> None:
    case = Case(6, 40)
    expected = case.run(compiled)
    for later in (1, 3):
        case.c[-later:], case.k_pe[-later:] = math.nan, math.inf
        found = case.run(compiled)
        assert torch.equal(found[:-later], expected[:-later])
        assert found[-later:].isnan().all()


def test_bfloat16_rounds_what_meets_kv_b(compiled: Kernels) -> None:
    case = Case(5, 60)
    exact, rounded = case.run(compiled), case.run(compiled, torch.bfloat16)
    assert not torch.equal(exact, rounded)
    # Sums of another order can fall on the other side of a rounding: 8 bits of mantissa.
    torch.testing.assert_close(rounded, case.twin(torch.bfloat16), rtol=0, atol=2**-8 * float(exact.abs().max()))
    assert (rounded - case.twin(torch.bfloat16)).abs().mean() < 0.2 * (rounded - exact).abs().mean()
    alone = torch.cat([case.part(compiled, t, t + 1, torch.bfloat16) for t in range(5)])
    assert torch.equal(alone, rounded)


def moved(tensor: Tensor, offset: int) -> Tensor:
    """The same at an address that is no multiple of its elements, as in the published shards."""
    raw = tensor.contiguous().view(torch.uint8).flatten()
    buffer = bytearray(offset) + bytearray(raw.tolist())
    return torch.frombuffer(buffer, dtype=tensor.dtype, offset=offset, count=tensor.numel()).view(tensor.shape)


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


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_begin_anywhere_and_nothing_behind_them_is_read(compiled: Kernels, kind: str) -> None:
    for tokens in (1, 5):
        case = Case(tokens, 11, kind=kind)
        expected, weight, scale = case.run(compiled), case.kv_b.weight, case.kv_b.scale
        for place in (lambda tensor: moved(tensor, 3), before_a_wall):
            placed = None if scale is None else place(scale)
            case.kv_b = Matrix(weight=place(weight), scale=placed, block=case.kv_b.block)
            assert torch.equal(case.run(compiled), expected)


def test_nothing_behind_queries_and_cache_is_read(compiled: Kernels) -> None:
    for sizes in SIZES:
        case = Case(3, 37, sizes)
        expected = case.run(compiled)
        case.q, case.c, case.k_pe = (before_a_wall(tensor) for tensor in (case.q, case.c, case.k_pe))
        assert torch.equal(case.run(compiled), expected)


def test_a_number_that_is_none_is_seen(compiled: Kernels) -> None:
    case = Case(3, 20)
    case.kv_b.weight.view(torch.uint8)[44 * 2 + 24 + 1, 5] = 0x7F  # the second value of the third head
    found = case.run(compiled)
    assert found.isnan().nonzero().tolist() == [[t, 2, 1] for t in range(3)]
    for tokens, code in ((1, 0x7F), (1, 0xFF), (3, 0x7F), (9, 0xFF)):
        case = Case(tokens, 20, SIZES[3])
        case.kv_b.weight.view(torch.uint8)[200 + 5, 77] = code  # a key of the second head
        found = case.run(compiled).isnan()
        assert found[:, 1].all()
        assert not found[:, 0::2].any()
    case = Case(3, 20)
    case.q[1, 4, 0] = math.nan
    assert case.run(compiled).isnan().any(-1).nonzero().tolist() == [[1, 4]]


def test_no_tokens(compiled: Kernels) -> None:
    assert Case(0, 5).run(compiled).shape == (0, 5, 20)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 72, 7168])
def test_norm(compiled: Kernels, size: int) -> None:
    x, weight = 5 * seeded(7, size), 1 + seeded(size)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    found = compiled.norm(x, weight, 1e-6)
    torch.testing.assert_close(found.double(), exact, rtol=5e-7, atol=0)
    beside = torch.cat((x, seeded(7, 9)), 1)[:, :size]  # rows that do not follow each other
    assert torch.equal(compiled.norm(beside, weight, 1e-6), found)
    assert torch.equal(torch.cat([compiled.norm(row, weight, 1e-6) for row in x.split(1)]), found)
    assert torch.equal(compiled.norm(before_a_wall(x), before_a_wall(weight), 1e-6), found)
    torch.set_num_threads(3)
    many = x.repeat(1000, 1)
    assert torch.equal(compiled.norm(many, weight, 1e-6), found.repeat(1000, 1))


def test_latents_are_the_norm_and_the_rotation(compiled: Kernels) -> None:
    for latent, rotary in ((16, 4), (37, 2), (512, 64)):
        x, weight = seeded(5, latent + rotary), 1 + seeded(latent)
        rotation = Rotation(cos=seeded(5, rotary // 2), sin=seeded(5, rotary // 2, seed=1))
        c, k_pe = torch.full((8, latent), 7.0), torch.full((8, rotary), 7.0)
        turn = (rotation.cos, rotation.sin)
        compiled.latents(x, weight, 1e-6, turn, c[:7], k_pe[:7])
        assert torch.equal(c[2:7], compiled.norm(x[:, :latent], weight, 1e-6))
        assert torch.equal(k_pe[2:7], rotate(x[:, latent:], rotation))
        for rest in (c[:2], c[7:], k_pe[:2], k_pe[7:]):
            assert (rest == 7).all()


@pytest.mark.usefixtures("every_way")
def test_norms_take_any_shape() -> None:
    x, weight = seeded(2, 3, 20), seeded(20)
    assert rms_norm(x, weight, 1e-6).shape == (2, 3, 20)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6)[1], rms_norm(x[1], weight, 1e-6), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["v3", "kimi", "moonlight", "v2_lite", "v2"])
@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": True}, {"norm_topk_prob": False}])
def test_routing_equals_torch_and_each_token_is_alone(
    compiled: Kernels, tiny_configs: dict[str, dict[str, Any]], family: str, changes: dict[str, Any]
) -> None:
    config = ModelConfig.from_dict(tiny_configs[family] | changes)
    logits = 2 * seeded(300, 16)
    bias = 0.3 * seeded(16) - 0.7 if config.topk_method == "noaux_tc" else None
    twin = route_greedy(logits, config) if bias is None else route_noaux_tc(logits, bias, config)
    found = route_compiled(compiled, logits, bias, config)
    assert torch.equal(found.expert_ids, twin.expert_ids)
    torch.testing.assert_close(found.weights, twin.weights, rtol=1e-6, atol=0)
    alone = [route_compiled(compiled, row, bias, config).weights for row in logits.split(1)]
    assert torch.equal(torch.cat(alone), found.weights)
    torch.set_num_threads(3)
    many = route_compiled(compiled, logits.repeat(100, 1), bias, config)
    assert torch.equal(many.weights, found.weights.repeat(100, 1))


def test_ties_go_to_the_lowest_id_and_a_nan_is_chosen(
    compiled: Kernels, tiny_configs: dict[str, dict[str, Any]]
) -> None:
    for family in ("v3", "kimi", "v2", "v2_lite"):
        config = ModelConfig.from_dict(tiny_configs[family])
        bias = torch.zeros(16) if config.topk_method == "noaux_tc" else None
        top = config.num_experts_per_tok
        equal = route_compiled(compiled, torch.zeros(1, 16), bias, config)
        assert equal.expert_ids.tolist() == [list(range(top))]
        logits = torch.zeros(1, 16)
        logits[0, 13] = math.nan
        with_nan = route_compiled(compiled, logits, bias, config)
        assert with_nan.weights.isnan().any()
        assert sorted(set(with_nan.expert_ids[0].tolist())) == with_nan.expert_ids[0].tolist()
