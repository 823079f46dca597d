"""Absorbed MLA over the latent cache equals plain MLA with keys and values built."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import runner.attention
from runner.attention import Attention, attend_absorbed
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.fp8 import Matrix
from runner.parameters import Parameters
from runner.rope import Rope

HEADS, NOPE, ROTARY, VALUE, LATENT = 5, 24, 8, 20, 28
SCALE = (NOPE + ROTARY) ** -0.5 * 1.87


def random_inputs(tokens: int, cached: int) -> dict[str, Tensor]:
    """Scores spread by about 2, so that the softmax is neither flat nor a single one."""
    generator = torch.Generator().manual_seed(tokens * 100 + cached)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "q_nope": normal(tokens, HEADS, NOPE),
        "q_pe": normal(tokens, HEADS, ROTARY),
        "c": normal(cached, LATENT),
        "k_pe": normal(cached, ROTARY),
        "kv_b": normal(HEADS * (NOPE + VALUE), LATENT) * LATENT**-0.5,
    }


def absorbed(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    kv_b = Matrix(weight=inputs["kv_b"], scale=None)
    query, latent = (inputs["q_nope"], inputs["q_pe"]), (inputs["c"], inputs["k_pe"])
    return attend_absorbed(*query, *latent, kv_b, scale=SCALE, dtype=dtype)


@pytest.mark.parametrize(("tokens", "cached"), [(1, 1), (1, 30), (7, 7), (7, 30), (30, 30)])
@pytest.mark.parametrize("score_limit", [1, 2 * 7 * 30, 1 << 24])
def test_absorbed_equals_plain(
    reference: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tokens: int, cached: int, score_limit: int
) -> None:
    monkeypatch.setattr(runner.attention, "_SCORE_ELEMENTS", score_limit)
    inputs = random_inputs(tokens, cached)
    expected = reference.attention.attend_plain(**inputs, scale=SCALE)
    assert expected.std() > 0.2
    torch.testing.assert_close(absorbed(inputs).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("block", [(128, 128), (30, 20), (44, 28)])
def test_torch_expands_a_few_heads_at_a_time(
    reference: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, heads: int, block: tuple[int, int]
) -> None:
    """Heads begin where they will in a block."""
    rows, sizes = NOPE + VALUE, []
    monkeypatch.setattr(runner.attention, "_EXPANDED_ELEMENTS", heads * rows * LATENT)
    dequantize = runner.attention.dequantize
    monkeypatch.setattr(
        runner.attention, "dequantize", lambda matrix: (sizes.append(matrix.weight.shape[0]), dequantize(matrix))[1]
    )
    inputs = random_inputs(3, 9)
    grid = -(-HEADS * rows // block[0]), -(-LATENT // block[1])
    kv_b = Matrix(
        weight=inputs["kv_b"].mul(100).to(torch.float8_e4m3fn), scale=0.005 + 0.01 * torch.rand(grid), block=block
    )
    inputs["kv_b"] = dequantize(kv_b)
    query, latent = (inputs["q_nope"], inputs["q_pe"]), (inputs["c"], inputs["k_pe"])
    found = attend_absorbed(*query, *latent, kv_b, scale=SCALE)
    expected = reference.attention.attend_plain(**inputs, scale=SCALE)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert len(sizes) == -(-HEADS // heads)
    assert max(sizes) < heads * rows + block[0]


def test_bfloat16_mode_rounds_what_meets_a_weight() -> None:
    inputs = random_inputs(3, 12)
    exact, rounded = absorbed(inputs), absorbed(inputs, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)
    # Queries that bfloat16 holds exactly leave only the rounding before the value product: 8 bits of mantissa.
    inputs["q_nope"] = inputs["q_nope"].bfloat16().float()
    torch.testing.assert_close(absorbed(inputs, torch.bfloat16), absorbed(inputs), rtol=0, atol=0.02)


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("family", ["v3", "v2_lite"])
@pytest.mark.parametrize("chunks", [[12], [5, 1, 6], [1] * 12])
def test_a_layer_equals_the_reference_however_the_text_is_cut(
    reference: SimpleNamespace,
    tiny_configs: dict[str, dict[str, Any]],
    tiny_weights: Callable[[str], dict[str, Tensor]],
    family: str,
    chunks: list[int],
) -> None:
    raw, weights = tiny_configs[family], tiny_weights(family)
    config = ModelConfig.from_dict(raw)
    x = torch.randn(12, config.hidden_size, generator=torch.Generator().manual_seed(1))
    plain = reference.tiny.expand(weights, reference.fp8.dequantize)
    prefix = "model.layers.1.self_attn"
    expected = torch.stack(reference.deepseek.attention(raw, plain, prefix, list(x.double())))
    assert expected.std() > 0.2

    parameters = Parameters(reference.tiny.DictStore(weights), config.weight_block_size)
    layer, rope, cache = Attention(config, parameters, 1, dtype=torch.float32), Rope(config), LatentCache(config, 12)
    parts = []
    for part in x.split(chunks):
        parts.append(layer(part, cache, rope.rotation(cache.length, len(part))))
        cache.advance(len(part))
    torch.testing.assert_close(torch.cat(parts).double(), expected, rtol=0, atol=2e-5)


def test_the_cache_holds_576_numbers_a_token_and_no_keys(
    reference: SimpleNamespace, tiny_configs: dict[str, dict[str, Any]]
) -> None:
    raw = tiny_configs["v3"] | {
        "kv_lora_rank": 512,
        "num_attention_heads": 4,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
    }
    config = ModelConfig.from_dict(raw)
    c, k_pe = LatentCache(config, 4).write(0, torch.zeros(1, 512), torch.zeros(1, 64))
    assert c.shape[1] + k_pe.shape[1] == 576
