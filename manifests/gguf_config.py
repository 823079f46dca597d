"""The config.json that a GGUF file of architecture ``deepseek2`` was converted from, out of its metadata.

Keys are Hugging Face's. What the file does not say is left out, so that whoever needs it refuses; what older
converters left out although the model has it is supplied where the model is known without doubt (see the comments).
A key of the architecture that is not known here may change the mathematics, so it is refused.
GGUF stores 32-bit floats: the number of fewest digits that is stored so is taken for what config.json had.
Source: the metadata that llama.cpp's converter writes for DEEPSEEK2, in its two generations (before April 2025 one
``attn_kv_b`` and head sizes in ``key_length``; since then ``attn_k_b``, ``attn_v_b`` and ``key_length_mla``).
This file knows metadata; it knows no files, and of tensors only whether two of them are there.
"""

import math
import struct
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from manifests.errors import ManifestError, UnsupportedModelError
from manifests.gguf_names import ARCHITECTURE

ARCHITECTURE_KEY = "general.architecture"

_SOFTMAX, _SIGMOID = 1, 2
_ROUTERS = {_SOFTMAX: "softmax", _SIGMOID: "sigmoid"}
_PLAIN_INTEGERS = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "expert_used_count": "num_experts_per_tok",
    "leading_dense_block_count": "first_k_dense_replace",
    "context_length": "max_position_embeddings",
}
"""Keys of the architecture, and the keys of config.json with the same value."""

_OTHERS = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.layer_norm_rms_epsilon",
    "expert_weights_scale",
    "expert_weights_norm",
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}

# (router, experts) -> (n_group, topk_group) of the models whose older files do not say it: V3 and R1, V2 and V2.5.
_GROUPS = {("sigmoid", 256): (8, 4), ("softmax", 160): (8, 3)}
# The same of beta_fast, which is 1 in Kimi-K2's config.json and 32, as its readers assume, in all others.
_BETA_FAST = {("sigmoid", 384): 1.0}


def hugging_face_config(metadata: Mapping[str, Any], *, has_router_bias: bool, has_head: bool) -> dict[str, Any]:
    """The config as config.json would have it; empty for another architecture.

    Args:
        metadata: Of the file, or of the first of a split set.
        has_router_bias: Whether there are tensors ``exp_probs_b.bias``.
        has_head: Whether there is a tensor ``output.weight``; else the embedding serves for it.

    Raises:
        ManifestError: A value has the wrong type.
        UnsupportedModelError: A key or value asks for something that is not known here.
    """
    if metadata.get(ARCHITECTURE_KEY) != ARCHITECTURE:
        return {}
    values = _Values(metadata)
    values.refuse_unknown()
    integers = {theirs: values.integer(key) for key, theirs in _PLAIN_INTEGERS.items()}
    config: dict[str, Any] = {key: value for key, value in integers.items() if value is not None}
    scoring_func = _read_router(values, has_router_bias)
    is_v3 = scoring_func == "sigmoid"
    config |= {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "q_lora_rank": integers["q_lora_rank"],
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_layer_freq": 1,
        "tie_word_embeddings": not has_head,
        "num_nextn_predict_layers": 0,
        "scoring_func": scoring_func,
        # The converter writes neither when config.json says neither, or false.
        "norm_topk_prob": values.flag("expert_weights_norm") or False,
        "routed_scaling_factor": 1.0 if (scale := values.number("expert_weights_scale")) is None else scale,
        **_read_head_sizes(values, integers["qk_rope_head_dim"]),
        **_read_groups(values, scoring_func, integers["n_routed_experts"]),
    }
    for key, theirs in (("attention.layer_norm_rms_epsilon", "rms_norm_eps"), ("rope.freq_base", "rope_theta")):
        if (number := values.number(key)) is not None:
            config[theirs] = number
    config["rope_scaling"] = _read_rope_scaling(values, scoring_func, integers["n_routed_experts"])
    for name in ("bos_token_id", "eos_token_id"):
        if (token := values.integer(f"tokenizer.ggml.{name}", prefix="")) is not None:
            config[name] = token
    return config


def _read_router(values: "_Values", has_router_bias: bool) -> str:
    gating = values.integer("expert_gating_func")
    if gating is None:
        # V2's files and V3's first ones do not say it. A bias on the choice is V3's alone.
        gating = _SIGMOID if has_router_bias else _SOFTMAX
    if gating not in _ROUTERS or (gating == _SOFTMAX and has_router_bias):
        bias = "with" if has_router_bias else "without"
        raise UnsupportedModelError(
            f"the GGUF metadata has {ARCHITECTURE}.expert_gating_func {gating} {bias} a bias on the router; "
            "known are 1 (softmax, without) and 2 (sigmoid)"
        )
    return _ROUTERS[gating]


def _read_head_sizes(values: "_Values", rope: int | None) -> dict[str, int]:
    """Sizes of a head before its keys and values are compressed, which the newer files have in keys of their own."""
    suffix = "_mla" if values.integer("attention.key_length_mla") is not None else ""
    key, value = values.integer(f"attention.key_length{suffix}"), values.integer(f"attention.value_length{suffix}")
    sizes = {} if value is None else {"v_head_dim": value}
    if key is None or rope is None:
        return sizes
    if key <= rope:
        raise values.fault(f"attention.key_length{suffix}", key, f"more than rope.dimension_count {rope}")
    return sizes | {"qk_nope_head_dim": key - rope}


def _read_groups(values: "_Values", scoring_func: str, experts: int | None) -> dict[str, Any]:
    n_group, topk_group = values.integer("expert_group_count"), values.integer("expert_group_used_count")
    if n_group is None and topk_group is None:
        n_group, topk_group = _GROUPS.get((scoring_func, experts or 0), (1, 1))
    softmax_method = "greedy" if n_group == 1 else "group_limited_greedy"
    topk_method = "noaux_tc" if scoring_func == "sigmoid" else softmax_method
    return {"n_group": n_group, "topk_group": topk_group, "topk_method": topk_method}


def _read_rope_scaling(values: "_Values", scoring_func: str, experts: int | None) -> dict[str, Any] | None:
    kind, factor = values.text("rope.scaling.type"), values.number("rope.scaling.factor")
    if kind is None and factor is None:
        return None
    if kind == "none":
        return None
    if kind != "yarn":
        # Whoever reads the config knows what it implements; ggml takes a factor without a type for linear scaling.
        return {"type": kind or "linear", "factor": factor}
    beta_fast = values.number("rope.scaling.yarn_beta_fast")
    scaling: dict[str, Any] = {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": values.integer("rope.scaling.original_context_length"),
        "beta_fast": _BETA_FAST.get((scoring_func, experts or 0)) if beta_fast is None else beta_fast,
        "beta_slow": values.number("rope.scaling.yarn_beta_slow"),
    }
    if (multiplier := values.number("rope.scaling.yarn_log_multiplier")) is not None:
        # The converter stores 0.1 * mscale_all_dim, and not mscale, which is the same in every published config.
        scaling["mscale"] = scaling["mscale_all_dim"] = float(Decimal(repr(multiplier)) * 10)
    return {key: value for key, value in scaling.items() if value is not None}


class _Values:
    """Typed reads of the architecture's metadata; None for what is absent."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def fault(self, key: str, value: object, must: str, *, prefix: str = f"{ARCHITECTURE}.") -> ManifestError:
        """What to raise: the key and what its value must be."""
        return ManifestError(f"the GGUF metadata has {prefix}{key} {value!r:.80}; it must be {must}")

    def refuse_unknown(self) -> None:
        """Refuse keys of the architecture that this file does not read."""
        prefix = f"{ARCHITECTURE}."
        known = {prefix + key for key in (*_PLAIN_INTEGERS, *_OTHERS)}
        for key in self._metadata:
            if key.startswith(prefix) and key not in known:
                raise UnsupportedModelError(
                    f"the GGUF metadata has {key!r:.200}, which this version does not know and which may change what "
                    "the model computes; update it"
                )

    def integer(self, key: str, *, prefix: str = f"{ARCHITECTURE}.") -> int | None:
        """A whole number from 0."""
        value = self._metadata.get(prefix + key)
        if value is None or (type(value) is int and value >= 0):
            return value
        raise self.fault(key, value, "a whole number from 0", prefix=prefix)

    def number(self, key: str) -> float | None:
        """A finite number, with as few digits as its 32 bits allow."""
        value = self._metadata.get(f"{ARCHITECTURE}.{key}")
        if value is None:
            return None
        if type(value) is not float or not math.isfinite(value):
            raise self.fault(key, value, "a finite float")
        return _shortest(value)

    def flag(self, key: str) -> bool | None:
        """A truth value."""
        value = self._metadata.get(f"{ARCHITECTURE}.{key}")
        if value is None or type(value) is bool:
            return value
        raise self.fault(key, value, "a truth value")

    def text(self, key: str) -> str | None:
        """A string."""
        value = self._metadata.get(f"{ARCHITECTURE}.{key}")
        if value is None or type(value) is str:
            return value
        raise self.fault(key, value, "a string")


def _shortest(value: float) -> float:
    """The number of fewest digits that is stored as the same 32 bits; the value itself when it needs more bits."""
    stored = _in_32_bits(value)
    if stored is None or struct.unpack("<f", stored)[0] != value:
        return value
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 9))
    return next((near for near in candidates if _in_32_bits(near) == stored), value)


def _in_32_bits(value: float) -> bytes | None:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return None
