"""The config out of a GGUF file: what the runner reads from it is what it reads from the model's own config.json."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import manifests
from manifests.errors import ManifestError, UnsupportedModelError
from manifests.gguf_config import hugging_face_config
from runner.config import ModelConfig
from tests.gguf_files import CONFIG as TINY
from tests.gguf_files import metadata, write_gguf

Config = dict[str, Any]

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
V2_LITE: Config = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "scoring_func": "softmax",
    "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-06, "max_position_embeddings": 163840, "rope_theta": 10000.0,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "bos_token_id": 100000, "eos_token_id": 100001,
}  # fmt: skip
V2: Config = V2_LITE | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
    "num_attention_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160, "n_group": 8, "topk_group": 3,
    "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
}  # fmt: skip
V3: Config = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
    "rms_norm_eps": 1e-06, "max_position_embeddings": 163840, "rope_theta": 10000.0,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# Its own model_type is kimi_k2, which no GGUF file says; the runner computes the same for both.
KIMI: Config = V3 | {
    "vocab_size": 163840, "num_attention_heads": 64, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.827, "first_k_dense_replace": 1, "max_position_embeddings": 131072,
    "rope_theta": 50000.0, "bos_token_id": 163584, "eos_token_id": 163585,
    "rope_scaling": V3["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0},
}  # fmt: skip
MOONLIGHT: Config = V2_LITE | {
    "model_type": "deepseek_v3", "vocab_size": 163840, "intermediate_size": 11264, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-05,
    "max_position_embeddings": 8192, "rope_theta": 50000.0, "rope_scaling": None, "bos_token_id": 163584,
    "eos_token_id": 163585,
}  # fmt: skip
MODELS = {"v2_lite": V2_LITE, "v2": V2, "v3": V3, "kimi": KIMI, "moonlight": MOONLIGHT}


def opened(path: Path, config: Config, **how: Any) -> manifests.Checkpoint:
    """A file with this model's metadata, and tensors of its kind but of a tiny size."""
    forms = TINY | {"scoring_func": config["scoring_func"], "q_lora_rank": config["q_lora_rank"] and 32}
    write_gguf(path, config, forms=forms, **how)
    return manifests.open(path)


# Converters that do not write beta_fast lose Kimi's, which only its number of experts tells.
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_the_runner_sees_the_model_that_was_converted(model: str, new: bool, tmp_path: Path) -> None:
    config = MODELS[model]
    checkpoint = opened(tmp_path / "x.gguf", config, new=new)
    assert ModelConfig.from_dict(checkpoint.config) == ModelConfig.from_dict(config)
    facts = checkpoint.manifest.model
    assert facts.model_type == config["model_type"]
    assert (facts.num_hidden_layers, facts.n_routed_experts) == (
        config["num_hidden_layers"],
        config["n_routed_experts"],
    )


@pytest.mark.parametrize("model", MODELS)
def test_first_files_do_not_say_how_experts_are_chosen(model: str, tmp_path: Path) -> None:
    """Neither the function nor the groups: a bias on the router shows the one, the number of experts the other."""
    config = MODELS[model]
    checkpoint = opened(tmp_path / "x.gguf", config, new=True, router=False)
    assert ModelConfig.from_dict(checkpoint.config) == ModelConfig.from_dict(config)


def test_what_the_file_does_not_say_is_left_to_who_needs_it(tmp_path: Path) -> None:
    for key, theirs in (("vocab_size", "vocab_size"), ("attention.layer_norm_rms_epsilon", "rms_norm_eps")):
        config = opened(tmp_path / "x.gguf", V3, change={key: None}).config
        assert theirs not in config
        with pytest.raises(ManifestError, match=theirs):
            ModelConfig.from_dict(config)
    plain = opened(tmp_path / "x.gguf", V3, change={"rope.scaling.yarn_log_multiplier": None}).config
    assert "mscale_all_dim" not in plain["rope_scaling"]
    assert opened(tmp_path / "x.gguf", V3, change={"expert_weights_scale": None}).config["routed_scaling_factor"] == 1.0


def of(config: Config = V3, *, bias: bool = True, head: bool = True, **change: Any) -> Config:
    """The config from metadata alone, some of it changed; a None takes a key away."""
    found = {f"deepseek2.{key}": value for key, value in metadata(config, new=True).items()}
    found |= {f"deepseek2.{key.replace('__', '.')}": value for key, value in change.items()}
    present = {key: value for key, value in found.items() if value is not None}
    return hugging_face_config(present | {"general.architecture": "deepseek2"}, has_router_bias=bias, has_head=head)


def test_groups_of_which_half_is_said_are_not_guessed() -> None:
    """Only where neither is said is it an older file of a known model."""
    for said, missing in (("expert_group_count", "topk_group"), ("expert_group_used_count", "n_group")):
        left = {key: None for key in ("expert_group_count", "expert_group_used_count") if key != said}
        config = of(**left)
        assert config[missing] is None
        with pytest.raises(ManifestError, match="group"):
            ModelConfig.from_dict(config)


def test_other_architectures_have_no_config() -> None:
    for name in ("llama", "deepseek", "Deepseek2", 3, None):
        assert hugging_face_config({"general.architecture": name}, has_router_bias=False, has_head=True) == {}
    assert hugging_face_config({}, has_router_bias=False, has_head=True) == {}


def test_an_embedding_that_serves_as_head_is_said() -> None:
    assert of()["tie_word_embeddings"] is False
    assert of(head=False)["tie_word_embeddings"] is True
    assert [ModelConfig.from_dict(of(head=head)).tie_word_embeddings for head in (True, False)] == [False, True]


def test_scaling_of_another_kind_is_said_and_refused() -> None:
    assert of(rope__scaling__type="none")["rope_scaling"] is None
    for kind in ("linear", "longrope", None):
        scaling = of(rope__scaling__type=kind)["rope_scaling"]
        assert scaling == {"type": kind or "linear", "factor": 40.0}
        with pytest.raises(UnsupportedModelError, match="of type"):
            ModelConfig.from_dict(of(rope__scaling__type=kind))


@pytest.mark.parametrize(
    "key",
    [
        "attention.temperature_scale", "attention.sliding_window", "nextn_predict_layers", "rope.scaling.attn_factor",
        "rope.scaling.yarn_ext_factor", "attn_logit_softcapping", "logit_scale", "attention.indexer.top_k", "",
    ],
)  # fmt: skip
def test_keys_that_may_change_the_mathematics_are_refused(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match="does not know and which may change"):
        of(**{key: 1})


@pytest.mark.parametrize(("gating", "bias"), [(0, False), (1, True), (3, False), (4, True), (0, True)])
def test_routers_that_are_not_known(gating: int, bias: bool) -> None:
    with pytest.raises(UnsupportedModelError, match=f"expert_gating_func {gating} {'with' if bias else 'without'} a"):
        of(expert_gating_func=gating, bias=bias)


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("block_count", -1, "a whole number from 0"),
        ("block_count", 61.0, "a whole number from 0"),
        ("block_count", True, "a whole number from 0"),
        ("attention__head_count", (128, 128), "a whole number from 0"),
        ("vocab_size", "129280", "a whole number from 0"),
        ("attention__layer_norm_rms_epsilon", math.nan, "a finite float"),
        ("rope__freq_base", math.inf, "a finite float"),
        ("rope__freq_base", 10000, "a finite float"),
        ("expert_weights_scale", "2.5", "a finite float"),
        ("rope__scaling__yarn_log_multiplier", -math.inf, "a finite float"),
        ("expert_weights_norm", 1, "a truth value"),
        ("rope__scaling__type", 3, "a string"),
        ("attention__key_length_mla", 64, "more than rope.dimension_count 64"),
        ("expert_gating_func", "2", "a whole number from 0"),
    ],
)
def test_values_of_the_wrong_type(key: str, value: Any, must: str) -> None:
    with pytest.raises(ManifestError, match="the GGUF metadata has deepseek2") as caught:
        of(**{key: value})
    assert must in str(caught.value)


def test_a_refused_config_does_not_keep_anyone_from_listing(tmp_path: Path) -> None:
    for change, error in (({"logit_scale": 1.0}, UnsupportedModelError), ({"rope.freq_base": math.nan}, ManifestError)):
        checkpoint = opened(tmp_path / "x.gguf", V3, change=change)
        assert checkpoint.manifest.model.model_type == "deepseek2"
        assert checkpoint.manifest.model.num_hidden_layers is None
        assert len(list(checkpoint.tensors())) > 50
        with pytest.raises(error):
            _ = checkpoint.config


@given(st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([3.4028234663852886e38])))
def test_floats_are_as_short_as_their_32_bits_allow_and_stored_the_same(value: float) -> None:
    found = of(expert_weights_scale=value)["routed_scaling_factor"]
    assert struct.pack("<f", found) == struct.pack("<f", value)
    assert len(repr(found)) <= len(repr(value))


# Six digits are what 32 bits keep apart.
@given(st.integers(1, 999_999), st.integers(-9, 6))
def test_the_decimals_of_a_config_come_back(digits: int, exponent: int) -> None:
    written = float(f"{digits}e{exponent}")
    stored = struct.unpack("<f", struct.pack("<f", written))[0]
    assert of(expert_weights_scale=stored)["routed_scaling_factor"] == written


def test_a_float_of_64_bits_stays_itself() -> None:
    for value in (math.pi, 1e300, 1e-300):
        assert of(expert_weights_scale=value)["routed_scaling_factor"] == value


def test_kimi_is_the_same_model_under_either_name() -> None:
    named = ModelConfig.from_dict(KIMI | {"model_type": "kimi_k2"})
    assert dataclasses.replace(named, model_type="deepseek_v3") == ModelConfig.from_dict(KIMI)
