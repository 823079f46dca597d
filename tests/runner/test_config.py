"""config.json: what is understood, what is refused, and that every refusal names its key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manifests.errors import ManifestError, ToolkitError, UnsupportedModelError
from runner.config import ModelConfig
from runner.expected import main_tensors, mtp_copies

Config = dict[str, Any]

NEEDED = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "norm_topk_prob",
    "routed_scaling_factor",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_theta",
]


@pytest.fixture
def v3(tiny_configs: dict[str, Config]) -> Config:
    copied: Config = json.loads(json.dumps(tiny_configs["v3"]))
    return copied


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def test_v3_is_read_whole(v3: Config) -> None:
    config = ModelConfig.from_dict(v3)
    assert (config.model_type, config.hidden_size, config.q_lora_rank) == ("deepseek_v3", 200, 144)
    assert (config.n_group, config.topk_group, config.num_experts_per_tok) == (4, 2, 4)
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
    assert (config.norm_topk_prob, config.routed_scaling_factor) == (True, 2.5)
    assert config.weight_block_size == (128, 128)
    assert config.qk_head_dim == 56
    assert config.num_nextn_predict_layers == 1
    yarn = config.rope_scaling
    assert yarn is not None
    assert (yarn.factor, yarn.original_max_position_embeddings) == (40.0, 4096)
    assert (yarn.beta_fast, yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim) == (32.0, 1.0, 1.0, 1.0)


def test_families_without_the_extras(tiny_configs: dict[str, Config]) -> None:
    moonlight = ModelConfig.from_dict(tiny_configs["moonlight"])
    assert (moonlight.rope_scaling, moonlight.q_lora_rank, moonlight.weight_block_size) == (None, None, None)
    v2 = ModelConfig.from_dict(tiny_configs["v2_lite"])
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob) == ("softmax", "greedy", False)
    assert v2.rope_scaling is not None
    assert v2.rope_scaling.mscale_all_dim == 0.707


def test_new_rope_parameters_mean_the_same(v3: Config) -> None:
    scaling = v3["rope_scaling"]
    inside = {"rope_type": "yarn", "rope_theta": 10000.0} | without(scaling, "type")
    new = without(v3, "rope_scaling", "rope_theta") | {"rope_parameters": inside}
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(v3)
    # Both at once, as some converters leave them, are fine while they agree.
    assert ModelConfig.from_dict(v3 | {"rope_parameters": inside}) == ModelConfig.from_dict(v3)


def test_new_rope_parameters_without_yarn(v3: Config) -> None:
    inside = {"rope_type": "default", "rope_theta": 50000.0}
    config = ModelConfig.from_dict(without(v3, "rope_scaling", "rope_theta") | {"rope_parameters": inside})
    assert (config.rope_scaling, config.rope_theta) == (None, 50000.0)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"rope_type": "yarn", "factor": 32, "original_max_position_embeddings": 4096}, "RoPE scaling"),
        ({"rope_type": "default", "rope_theta": 50000}, "RoPE"),
    ],
)
def test_two_rope_forms_that_disagree_are_refused(v3: Config, extra: Config, named: str) -> None:
    with pytest.raises(ManifestError, match=named):
        ModelConfig.from_dict(v3 | {"rope_parameters": extra})


def test_yarn_defaults_are_deepseeks(v3: Config) -> None:
    v3["rope_scaling"] = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    yarn = ModelConfig.from_dict(v3).rope_scaling
    assert yarn is not None
    assert (yarn.beta_fast, yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim) == (32.0, 1.0, 1.0, 0.0)


def test_missing_router_keys_mean_the_familys_own(tiny_configs: dict[str, Config]) -> None:
    for name, expected in (("v3", ("sigmoid", "noaux_tc")), ("kimi", ("sigmoid", "noaux_tc"))):
        config = ModelConfig.from_dict(without(tiny_configs[name], "scoring_func", "topk_method"))
        assert (config.scoring_func, config.topk_method) == expected
    config = ModelConfig.from_dict(without(tiny_configs["v2_lite"], "scoring_func", "topk_method"))
    assert (config.scoring_func, config.topk_method) == ("softmax", "greedy")


@pytest.mark.parametrize("value", [None, 0, "absent"])
def test_no_q_lora_has_three_spellings(v3: Config, value: object) -> None:
    config = without(v3, "q_lora_rank") if value == "absent" else v3 | {"q_lora_rank": value}
    assert ModelConfig.from_dict(config).q_lora_rank is None


def test_null_groups_and_null_shared_experts(v3: Config) -> None:
    config = ModelConfig.from_dict(v3 | {"n_group": None, "topk_group": None, "n_shared_experts": None})
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (1, 1, 0)


@pytest.mark.parametrize(("value", "expected"), [(1, (1,)), ([1, 5], (1, 5)), (None, ()), ([], ())])
def test_eos_may_be_one_or_many(v3: Config, value: object, expected: tuple[int, ...]) -> None:
    assert ModelConfig.from_dict(v3 | {"eos_token_id": value}).eos_token_ids == expected


def test_ue8m0_activation_scales_change_nothing(v3: Config) -> None:
    v3["quantization_config"]["scale_fmt"] = "ue8m0"
    assert ModelConfig.from_dict(v3).weight_block_size == (128, 128)


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_named(v3: Config, key: str) -> None:
    with pytest.raises(ManifestError, match=rf"\b{key}\b") as caught:
        ModelConfig.from_dict(without(v3, key))
    assert caught.value.exit_code == 12


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings"])
def test_a_missing_yarn_key_is_named(v3: Config, key: str) -> None:
    del v3["rope_scaling"][key]
    with pytest.raises(ManifestError, match=rf"rope_scaling\.{key}\b"):
        ModelConfig.from_dict(v3)


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(ManifestError, match=r"hidden_size.*rms_norm_eps") as caught:
        ModelConfig.from_dict({"model_type": "deepseek_v3"})
    assert len(caught.value.problems) > 10


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", -7168),
        ("hidden_size", 0),
        ("hidden_size", 10**30),
        ("hidden_size", 7168.5),
        ("hidden_size", "7168"),
        ("hidden_size", True),
        ("hidden_size", None),
        ("num_hidden_layers", []),
        ("first_k_dense_replace", -1),
        ("q_lora_rank", -1),
        ("n_shared_experts", -1),
        ("routed_scaling_factor", float("nan")),
        ("routed_scaling_factor", float("inf")),
        ("routed_scaling_factor", "2.5"),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", 0.5),
        ("norm_topk_prob", 1),
        ("model_type", 3),
        ("hidden_act", 3),
        ("attention_bias", "no"),
        ("scoring_func", 3),
        ("eos_token_id", -1),
        ("eos_token_id", [1, "2"]),
        ("bos_token_id", "0"),
        ("rope_scaling", "yarn"),
        ("quantization_config", ["fp8"]),
    ],
)
def test_a_bad_value_is_named(v3: Config, key: str, value: object) -> None:
    with pytest.raises(ManifestError, match=rf"\b{key}\b") as caught:
        ModelConfig.from_dict(v3 | {key: value})
    assert caught.value.exit_code == 12


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rope_scaling.factor", 0),
        ("rope_scaling.factor", "40"),
        ("rope_scaling.beta_fast", -1),
        ("rope_scaling.mscale", float("nan")),
        ("quantization_config.weight_block_size", [128]),
        ("quantization_config.weight_block_size", [128, 0]),
        ("quantization_config.weight_block_size", [128, 128.0]),
        ("quantization_config.quant_method", None),
    ],
)
def test_a_bad_nested_value_is_named_with_its_path(v3: Config, path: str, value: object) -> None:
    outer, inner = path.split(".")
    v3[outer][inner] = value
    with pytest.raises(ManifestError, match=path.replace(".", r"\.")):
        ModelConfig.from_dict(v3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"n_group": 16, "topk_group": 4}, "n_group"),  # one expert in a group: no sum of two
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),  # two groups of four are kept
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(v3: Config, changes: Config, named: str) -> None:
    with pytest.raises(ManifestError, match=named) as caught:
        ModelConfig.from_dict(v3 | changes)
    assert caught.value.problems[0].kind == "inconsistent"


def test_the_embedding_may_be_the_head(v3: Config) -> None:
    assert not ModelConfig.from_dict(v3 | {"tie_word_embeddings": None}).tie_word_embeddings
    tied = ModelConfig.from_dict(v3 | {"tie_word_embeddings": True})
    assert tied.tie_word_embeddings
    assert "lm_head.weight" not in dict(main_tensors(tied))
    assert mtp_copies(tied)["model.layers.3.shared_head.head.weight"] == "model.embed_tokens.weight"
    with pytest.raises(ManifestError, match="tie_word_embeddings 1; it must be true or false"):
        ModelConfig.from_dict(v3 | {"tie_word_embeddings": 1})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "deepseek_v32"}, "deepseek_v32"),
        ({"model_type": "llama"}, "llama"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"topk_method": "sampled"}, "sampled"),
        ({"scoring_func": "softmax"}, "softmax"),
        ({"scoring_func": "softmax", "topk_method": "greedy"}, "greedy"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "linear"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [1, 1]}}, "e5m2"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(v3: Config, changes: Config, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        ModelConfig.from_dict(v3 | changes)
    assert caught.value.exit_code == 14


def test_v2_refuses_v3s_router(tiny_configs: dict[str, Config]) -> None:
    with pytest.raises(UnsupportedModelError, match="noaux_tc"):
        ModelConfig.from_dict(tiny_configs["v2"] | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})


def test_a_rope_key_that_nobody_knows_is_refused(v3: Config) -> None:
    v3["rope_scaling"]["attention_factor"] = None
    ModelConfig.from_dict(v3)
    v3["rope_scaling"]["attention_factor"] = 1.2
    with pytest.raises(UnsupportedModelError, match="attention_factor"):
        ModelConfig.from_dict(v3)


@pytest.mark.parametrize("config", [[], "x", 3, None])
def test_anything_but_an_object_is_refused(config: Any) -> None:
    with pytest.raises(ManifestError, match="JSON object"):
        ModelConfig.from_dict(config)


def test_no_value_of_any_key_ends_in_a_traceback(v3: Config) -> None:
    strange = [
        None,
        True,
        -1,
        0,
        1,
        3,
        10**400,
        1.5,
        float("nan"),
        float("inf"),
        "x" * 400,
        "",
        [],
        [None],
        {},
        {"type": 1},
    ]
    changed = [v3 | {key: value} for key in v3 for value in strange]
    for outer in ("rope_scaling", "quantization_config"):
        changed += [v3 | {outer: v3[outer] | {key: value}} for key in v3[outer] for value in strange]
    refusals = []
    for config in changed:
        try:
            ModelConfig.from_dict(config)
        except ToolkitError as error:
            refusals.append(str(error))
    assert len(refusals) > 300
    assert max(map(len, refusals)) < 300


@pytest.mark.parametrize("key", ["n_group", "topk_group"])
def test_groups_are_not_guessed(tiny_configs: dict[str, dict[str, Any]], key: str) -> None:
    """Without the key V3's own code would use 8 or 4, other readers 1: another routing, and nobody would notice."""
    config = {name: value for name, value in tiny_configs["v3"].items() if name != key}
    with pytest.raises(ManifestError, match=f"lacks {key}"):
        ModelConfig.from_dict(config)


def test_several_groups_need_to_know_how_many_are_kept(tiny_configs: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ManifestError, match="topk_group None"):
        ModelConfig.from_dict(tiny_configs["v3"] | {"topk_group": None})
    ungrouped = ModelConfig.from_dict(tiny_configs["v3"] | {"n_group": None, "topk_group": None})
    assert (ungrouped.n_group, ungrouped.topk_group) == (1, 1)


def test_rope_types_that_differ_are_refused(tiny_configs: dict[str, dict[str, Any]]) -> None:
    scaling = {"type": "yarn", "rope_type": "default", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ManifestError, match="differ"):
        ModelConfig.from_dict(tiny_configs["v3"] | {"rope_scaling": scaling, "rope_parameters": None})
