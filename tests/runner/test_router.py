"""Routers against scalar transcriptions, and the cases that other implementations got wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runner.config import ModelConfig
from runner.router import Routing, route_greedy, route_noaux_tc

Config = dict[str, Any]


def as_dicts(routing: Routing) -> list[dict[int, float]]:
    """Expert id -> weight for each token."""
    pairs = zip(routing.expert_ids.tolist(), routing.weights.tolist(), strict=True)
    return [dict(zip(ids, weights, strict=True)) for ids, weights in pairs]


def random_logits(seed: int, tokens: int = 200) -> Tensor:
    return 2 * torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    assert len(ours) == len(expected)
    for mine, other in zip(ours, expected, strict=True):
        assert list(mine) == sorted(other)
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("bias_mean", [-2.0, -0.7, 0.0, 0.5])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", ["v3", "kimi"])
def test_v3_router_equals_the_reference(
    reference: SimpleNamespace, tiny_configs: dict[str, Config], family: str, norm: bool, bias_mean: float
) -> None:
    """At a mean of -2 every biased score is negative: a mask of 0.0 would choose left-out groups only."""
    raw = tiny_configs[family] | {"norm_topk_prob": norm}
    logits = random_logits(1)
    bias = bias_mean + 0.3 * torch.randn(16, generator=torch.Generator().manual_seed(2))
    ours = as_dicts(route_noaux_tc(logits, bias, ModelConfig.from_dict(raw)))
    assert_same(ours, [reference.deepseek.route_v3(raw, row, bias.tolist()) for row in logits.tolist()])


@pytest.fixture
def four(tiny_configs: dict[str, Config]) -> ModelConfig:
    """Four experts in two groups, one group kept, two chosen."""
    small = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    return ModelConfig.from_dict(tiny_configs["v3"] | small)


def test_left_out_groups_are_minus_infinity(four: ModelConfig) -> None:
    # Biased scores -0.4 -0.5 | -0.9 -0.9: all negative. transformers 4.51 to 4.57.6 and others mask with 0.0, and
    # then take experts 2 and 3 of the group that lost.
    routing = route_noaux_tc(torch.zeros(1, 4), torch.tensor([-0.9, -1.0, -1.4, -1.4]), four)
    assert routing.expert_ids.tolist() == [[0, 1]]


def test_a_group_scores_the_sum_of_its_best_two(four: ModelConfig) -> None:
    # Group 0 has the best expert, group 1 the better pair.
    routing = route_noaux_tc(torch.zeros(1, 4), torch.tensor([0.9, 0.0, 0.6, 0.6]), four)
    assert routing.expert_ids.tolist() == [[2, 3]]


def test_the_bias_chooses_and_does_not_weigh(four: ModelConfig) -> None:
    logits = torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    weights = route_noaux_tc(logits, torch.tensor([5.0, 7.0, 0.0, 0.0]), four).weights[0]
    scores = logits.sigmoid()[0, :2]
    torch.testing.assert_close(weights, scores / scores.sum() * 2.5)


def test_ids_ascend_and_ties_go_to_the_lowest(tiny_configs: dict[str, Config]) -> None:
    config = ModelConfig.from_dict(tiny_configs["kimi"])
    assert route_noaux_tc(torch.zeros(1, 16), torch.zeros(16), config).expert_ids.tolist() == [[0, 1, 2, 3]]
    logits = torch.zeros(1, 16)
    logits[0, [14, 3]] = 1.0
    assert route_noaux_tc(logits, torch.zeros(16), config).expert_ids.tolist() == [[0, 1, 3, 14]]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", ["v2_lite", "v2"])
def test_v2_router_equals_the_reference(
    reference: SimpleNamespace, tiny_configs: dict[str, Config], family: str, norm: bool
) -> None:
    """transformers 5.23 ignores norm_topk_prob here, so the transcription is the only oracle for True."""
    raw = tiny_configs[family] | {"norm_topk_prob": norm}
    logits = random_logits(3)
    ours = as_dicts(route_greedy(logits, ModelConfig.from_dict(raw)))
    assert_same(ours, [reference.deepseek.route_v2(raw, row) for row in logits.tolist()])
    if norm:
        assert all(sum(one.values()) == pytest.approx(1, rel=1e-5) for one in ours)


def test_v2_groups_score_their_best_expert(tiny_configs: dict[str, Config]) -> None:
    small = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    config = ModelConfig.from_dict(tiny_configs["v2"] | small)
    routing = route_greedy(torch.tensor([[2.0, -5.0, 1.5, 1.5]]), config)
    assert routing.expert_ids.tolist() == [[0, 1]]


def test_v2_keeps_its_scores_whole_when_it_does_not_normalise(tiny_configs: dict[str, Config]) -> None:
    config = ModelConfig.from_dict(tiny_configs["v2_lite"])
    logits = random_logits(4, tokens=1)
    routing = route_greedy(logits, config)
    softmax = logits.softmax(-1)
    assert torch.equal(routing.weights, softmax.gather(1, routing.expert_ids))
    assert float(routing.weights.sum()) < 1


def test_routing_does_not_depend_on_the_other_tokens(tiny_configs: dict[str, Config]) -> None:
    config, logits = ModelConfig.from_dict(tiny_configs["v3"]), random_logits(5)
    bias = torch.full((16,), -0.7)
    whole = route_noaux_tc(logits, bias, config)
    for token in range(0, 200, 17):
        alone = route_noaux_tc(logits[token : token + 1], bias, config)
        assert torch.equal(alone.expert_ids[0], whole.expert_ids[token])
        torch.testing.assert_close(alone.weights[0], whole.weights[token])
