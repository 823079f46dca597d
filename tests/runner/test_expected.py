"""What a config promises, against the weights that the parity tests run."""

from collections.abc import Callable
from typing import Any

import pytest

from manifests.names import Role, parse_name
from runner.config import ModelConfig
from runner.expected import main_tensors


@pytest.mark.parametrize("family", ["v3", "kimi", "moonlight", "v2_lite", "v2"])
def test_no_tensor_too_many_none_too_few_and_each_of_its_shape(
    family: str,
    tiny_configs: dict[str, dict[str, Any]],
    tiny_weights: Callable[[str], dict[str, Any]],
) -> None:
    config = ModelConfig.from_dict(tiny_configs[family])
    stored = {
        name: tuple(weight.shape)
        for name, weight in tiny_weights(family).items()
        if not parse_name(name).is_scale
        and parse_name(name).role is not Role.BUFFER
        and (parse_name(name).layer is None or parse_name(name).layer < config.num_hidden_layers)
    }
    halves = {f"model.layers.1.self_attn.{half}_b_proj.weight" for half in ("k", "v")}
    split = dict(main_tensors(config, halves))
    assert split.keys() == stored.keys() - {"model.layers.1.self_attn.kv_b_proj.weight"} | halves
    assert [split[name] for name in sorted(halves)] == [(4, 136, 40), (4, 36, 136)]
    promised = list(main_tensors(config))
    assert dict(promised) == stored
    assert len(promised) == len(stored)
