"""The mixture: the right sum, and no weight asked for that is not used."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from manifests.errors import IncompleteError
from runner.config import ModelConfig
from runner.moe import MoE, _by_expert
from runner.parameters import Parameters
from runner.router import Routing

Tiny = Callable[[str], dict[str, Tensor]]
Configs = dict[str, dict[str, Any]]


def build(store: Any, config: ModelConfig) -> MoE:
    return MoE(config, Parameters(store, config.weight_block_size), 1, dtype=torch.float32)


def tokens(config: ModelConfig, count: int) -> Tensor:
    return torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(count))


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("family", ["v3", "v2_lite", "moonlight"])
def test_sum_equals_the_reference(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny, family: str
) -> None:
    config, weights = ModelConfig.from_dict(tiny_configs[family]), tiny_weights(family)
    x = tokens(config, 9)
    plain = reference.tiny.expand(weights, reference.fp8.dequantize)
    expected = torch.stack(
        [reference.deepseek.moe(tiny_configs[family], plain, "model.layers.1.mlp", one) for one in x.double()]
    )
    ours = build(reference.tiny.DictStore(weights), config)(x)
    assert expected.std() > 0.5
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=5e-5)


def test_each_chosen_expert_is_fetched_once_and_no_other(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny
) -> None:
    config = ModelConfig.from_dict(tiny_configs["v3"])
    store = reference.tiny.DictStore(tiny_weights("v3"))
    seen: list[tuple[int, Tensor]] = []
    build(store, config)(tokens(config, 3), lambda layer, ids: seen.append((layer, ids)))
    assert [layer for layer, _ in seen] == [1]
    chosen = set(seen[0][1].unique().tolist())
    assert 4 <= len(chosen) < 16
    asked = {name: count for name, count in store.asked.items() if ".experts." in name}
    assert {int(name.split(".")[5]) for name in asked} == chosen
    assert len(asked) == len(chosen) * 6  # three matrices, each with scales
    assert set(asked.values()) == {1}


def test_experts_that_are_not_there_are_not_missed(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny
) -> None:
    config, weights = ModelConfig.from_dict(tiny_configs["v3"]), tiny_weights("v3")
    x, seen = tokens(config, 2), []
    whole = build(reference.tiny.DictStore(weights), config)(x, lambda _, ids: seen.append(ids))
    chosen = set(seen[0].unique().tolist())

    def kept(name: str, experts: set[int]) -> bool:
        return ".experts." not in name or int(name.split(".")[5]) in experts

    partial = {name: tensor for name, tensor in weights.items() if kept(name, chosen)}
    assert len(partial) < len(weights)
    assert torch.equal(build(reference.tiny.DictStore(partial), config)(x), whole)
    lacking = {name: tensor for name, tensor in weights.items() if kept(name, chosen - {min(chosen)})}
    with pytest.raises(IncompleteError, match=rf"experts\.{min(chosen)}\."):
        build(reference.tiny.DictStore(lacking), config)(x)


@pytest.mark.usefixtures("every_way")
def test_experts_are_summed_in_order_of_their_id_however_they_arrive(
    reference: SimpleNamespace, tiny_configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of 1e8, 1 and -1e8 add up to 0 in this order and to 1 in another."""
    config = ModelConfig.from_dict(tiny_configs["kimi"] | {"n_shared_experts": 0, "num_experts_per_tok": 3})
    hidden, width = config.hidden_size, config.moe_intermediate_size
    value = {2: 1e8, 5: 1.0, 9: -1e8}
    tensors = {}
    for expert in value:
        prefix = f"model.layers.1.mlp.experts.{expert}."
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = torch.zeros(shape)
            tensors[f"{prefix}{name}.weight"][:, 0] = 1

    class Late(reference.tiny.DictStore):  # type: ignore[misc, name-defined]
        def expert_groups(self, layer: int, experts: list[int]) -> Any:
            (some,) = next(super().expert_groups(layer, experts))
            yield iter([[], [some[2]], [some[0], some[1]]])

    def route(x: Tensor) -> SimpleNamespace:
        one = float(silu(x[0, 0]) * x[0, 0])
        return SimpleNamespace(expert_ids=torch.tensor([[2, 5, 9]]), weights=torch.tensor([[1e8, 1.0, -1e8]]) / one)

    moe = build(Late(tensors), config)
    monkeypatch.setattr(moe, "_router", route)
    x = torch.zeros(1, hidden)
    x[0, 0] = 1
    assert moe(x).unique().tolist() == [0.0]


def test_a_model_without_shared_experts(reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny) -> None:
    weights = tiny_weights("v3")
    with_shared = ModelConfig.from_dict(tiny_configs["v3"])
    without = ModelConfig.from_dict(tiny_configs["v3"] | {"n_shared_experts": None})
    store = reference.tiny.DictStore(weights)
    x = tokens(with_shared, 2)
    assert not torch.allclose(build(store, without)(x), build(reference.tiny.DictStore(weights), with_shared)(x))
    assert not [name for name in store.asked if "shared" in name]


def test_one_token_is_grouped_as_it_is_among_others() -> None:
    ids, weights = torch.tensor([[1, 4, 9], [0, 4, 7]]), torch.rand(2, 3)
    one = list(_by_expert(Routing(expert_ids=ids[:1], weights=weights[:1])))
    both = {expert: (token, weight) for expert, token, weight in _by_expert(Routing(expert_ids=ids, weights=weights))}
    assert [expert for expert, _, _ in one] == [1, 4, 9]
    for expert, token, weight in one:
        among_token, among_weight = both[expert]
        assert torch.equal(token, among_token[:1])
        assert torch.equal(weight, among_weight[:1])
