"""Rotary tables and scales against published constants and complex multiplication."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runner.config import ModelConfig
from runner.rope import Rope, frequencies, rotate, softmax_scale

Config = dict[str, Any]

PUBLISHED = {"num_attention_heads": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def published(config: Config) -> ModelConfig:
    """The family's own head sizes."""
    return ModelConfig.from_dict(config | PUBLISHED)


@pytest.mark.parametrize(
    ("family", "scale"),
    # 192^-0.5 times (0.1 mscale ln factor + 1)^2; Moonlight has no YaRN.
    [("v3", 0.1352338), ("v2_lite", 0.1147214), ("kimi", 0.1308608), ("moonlight", 0.0721688)],
)
def test_softmax_scale_has_mscale_squared(tiny_configs: dict[str, Config], family: str, scale: float) -> None:
    assert softmax_scale(published(tiny_configs[family])) == pytest.approx(scale, abs=5e-8)


def test_v3_ramp_runs_from_pair_10_to_23(tiny_configs: dict[str, Config]) -> None:
    config = published(tiny_configs["v3"])
    plain = 10000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    ratio = frequencies(config).double() / plain
    torch.testing.assert_close(ratio[:11], torch.ones(11, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40, dtype=torch.float64), rtol=1e-6, atol=0)
    inside = torch.arange(10, 24, dtype=torch.float64)
    ramp = (inside - 10) / 13
    torch.testing.assert_close(ratio[10:24], ramp / 40 + 1 - ramp, rtol=1e-5, atol=0)


def test_kimi_ramp_is_a_step(tiny_configs: dict[str, Config]) -> None:
    ratio = frequencies(published(tiny_configs["kimi"])) / 50000.0 ** -(torch.arange(32) / 32)
    kept = ratio > 0.5
    assert 0 < int(kept.sum()) < 32
    torch.testing.assert_close(ratio, torch.where(kept, 1.0, 1 / 32), rtol=1e-5, atol=0)
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)


def test_ramp_ends_may_coincide(reference: SimpleNamespace, tiny_configs: dict[str, Config]) -> None:
    """A context of 6 is just under one turn of the first pair: both ends fall on pair 0, and its ramp is 0/0."""
    short = {"beta_fast": 1, "beta_slow": 1, "original_max_position_embeddings": 6}
    raw = tiny_configs["v3"] | {"rope_scaling": tiny_configs["v3"]["rope_scaling"] | short}
    frequency = frequencies(ModelConfig.from_dict(raw))
    expected = torch.tensor(reference.deepseek.frequencies(raw))
    assert expected[0] == 1
    assert expected[1] < 1 / 40
    torch.testing.assert_close(frequency, expected)


@pytest.mark.parametrize("family", ["v3", "kimi", "moonlight", "v2_lite"])
def test_rotation_equals_complex_multiplication(
    reference: SimpleNamespace, tiny_configs: dict[str, Config], family: str
) -> None:
    raw = tiny_configs[family]
    rotation = Rope(ModelConfig.from_dict(raw)).rotation(5, 3)
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotation)
    for t in range(3):
        for head in range(4):
            expected = reference.deepseek.rotate(raw, x[t, head].double(), 5 + t)
            torch.testing.assert_close(turned[t, head].double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(rotate(x[:, 1], rotation), turned[:, 1], rtol=0, atol=0)


def test_cos_and_sin_grow_when_the_two_mscales_differ(
    reference: SimpleNamespace, tiny_configs: dict[str, Config]
) -> None:
    raw = tiny_configs["v3"] | {"rope_scaling": tiny_configs["v3"]["rope_scaling"] | {"mscale_all_dim": 0.0}}
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, Rope(ModelConfig.from_dict(raw)).rotation(7, 1))
    assert float(turned.norm() / x.norm()) == pytest.approx(1.3688879, abs=1e-6)
    expected = reference.deepseek.rotate(raw, x[0].double(), 7)
    torch.testing.assert_close(turned[0].double(), expected, rtol=0, atol=2e-6)


def test_scores_depend_on_distance_only(tiny_configs: dict[str, Config]) -> None:
    rope = Rope(ModelConfig.from_dict(tiny_configs["v3"]))
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = [
        float(rotate(q, rope.rotation(far + 9, 1))[0] @ rotate(k, rope.rotation(far, 1))[0]) for far in (0, 13, 400)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=2e-4)
    assert scores[0] != pytest.approx(float(q[0] @ k[0]), abs=1e-2)
