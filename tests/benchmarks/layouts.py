"""The layouts of DeepSeek-V3, Kimi-K2 and DeepSeek-V2-Lite: every shard's name, header and tensors, without payload.

DeepSeek-V3 was written stage by stage of its training pipeline, in module order, every FP8 weight followed by its
scales; a shard is closed as soon as it has 2^32 elements, scales counted as elements too. Kimi-K2 was written by the
safetensors library, one decoder layer a shard: sorted by dtype and then by name, padded to 8 bytes, numbers in shard
names without leading zeros. All numbers come from the models' public config.json.

It knows names, shapes and offsets; it must not know what is in a tensor or where a shard is put.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, NamedTuple

from manifests.dtypes import nbytes
from manifests.header import HeaderTensor, encode_header
from runner.demo.shards import split

ELEMENT_LIMIT = 1 << 32
"""DeepSeek's writer closes a shard here: 8 GiB of bf16."""

STAGES = (range(7), range(7, 15), range(15, 23), range(23, 31), range(31, 39), range(39, 47), range(47, 54))
"""Layers of DeepSeek-V3's pipeline stages; the eighth has the rest."""

LIBRARY_DTYPES = ("F32", "BF16", "F8_E4M3")
"""The order in which the safetensors library (0.4 to 0.8) writes them."""

V3_CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2_CONFIG: Mapping[str, Any] = {
    **V3_CONFIG,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**V3_CONFIG["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
V2_LITE_CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {**V3_CONFIG["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}


class Tensor(NamedTuple):
    """A tensor without place and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """One shard: its file name, the bytes before its payload, its tensors in the order of their offsets."""

    name: str
    header: bytes
    tensors: tuple[HeaderTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.tensors[-1].end


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A whole checkpoint: config.json, model.safetensors.index.json and shards."""

    config: Mapping[str, Any]
    index: bytes
    shards: tuple[ShardLayout, ...]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def tensor_count(self) -> int:
        """Tensors in all shards."""
        return sum(len(shard.tensors) for shard in self.shards)


def deepseek_v3() -> Layout:
    """All 163 shards."""
    return _published(V3_CONFIG, _close_shards([*map(_v3_stage, STAGES), _last_v3_stage()]))


def deepseek_v3_first(count: int) -> Layout:
    """The first shards as a checkpoint of its own: other shard names, and no last weight without its scales."""
    shards = _close_shards([*map(_v3_stage, STAGES), _last_v3_stage()])[:count]
    if shards[-1][-1].dtype == "F8_E4M3":
        shards[-1] = shards[-1][:-1]
    return _published(V3_CONFIG, shards)


def deepseek_v3_part(size: int) -> Layout:
    """A checkpoint of about so many bytes from DeepSeek-V3's MoE layers, the first of them on, in at least two shards.

    The embedding and the dense layers before them are 3.6 GB, half of a small part, and 0.5 % of the whole.
    """
    taken: list[Tensor] = []
    filled = 0
    for tensor in chain.from_iterable(_layer(V3_CONFIG, number) for number in range(3, 61)):
        if filled >= size and not tensor.name.endswith("_scale_inv"):
            break
        taken.append(tensor)
        filled += nbytes(tensor.dtype, tensor.shape)
    elements = sum(prod(tensor.shape) for tensor in taken)
    limit = elements // max(2, round(elements / ELEMENT_LIMIT))  # equal shards, of the published size if they can be
    return _published(V3_CONFIG, _close_shards([taken], limit=limit))


def one_stage(config: Mapping[str, Any], *, limit: int = ELEMENT_LIMIT) -> Layout:
    """A checkpoint of any such config, as DeepSeek's writer makes it from one pipeline stage; whole for V2-Lite.

    Args:
        config: As V3_CONFIG or V2_LITE_CONFIG, with other sizes; it has an MTP layer if it says so.
        limit: Elements at which a shard is closed.
    """
    layers = config["num_hidden_layers"]
    middle = list(chain.from_iterable(_layer(config, number) for number in range(layers)))
    # V2-Lite has its head in the first shard; V3 behind the last layer.
    ends = _embedding(config), *_head(config)
    tensors = [*ends, *middle] if config["model_type"] == "deepseek_v2" else [ends[0], *middle, *ends[1:]]
    if config.get("num_nextn_predict_layers"):
        tensors += _mtp(config)
    return _published(config, _close_shards([tensors], limit=limit))


def kimi_k2(count: int = 61) -> Layout:
    """All 61 shards, or the first of them."""
    config = KIMI_K2_CONFIG
    shards = []
    for number in range(count):
        tensors = list(_layer(config, number))
        tensors.append(Tensor(f"model.layers.{number}.self_attn.rotary_emb.inv_freq", "BF16", (56,)))
        if number == 0:
            tensors.append(_embedding(config))
        if number == config["num_hidden_layers"] - 1:
            tensors += _head(config)
        shards.append(lay_out(f"model-{number + 1}-of-{count}.safetensors", library_order(tensors), align=8))
    size = sum(shard.tensors[-1].end for shard in shards)
    return Layout(config=config, index=_index(shards, size, sort_keys=True), shards=tuple(shards))


def lay_out(name: str, tensors: Iterable[Tensor], *, align: int = 1) -> ShardLayout:
    """A shard of these tensors, in this order; its payload starts at a multiple of `align`."""
    entries, position = [], 0
    for tensor in tensors:
        end = position + nbytes(tensor.dtype, tensor.shape)
        entries.append(HeaderTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, begin=position, end=end))
        position = end
    return ShardLayout(name=name, header=encode_header(entries, align=align), tensors=tuple(entries))


def library_order(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The order in which the safetensors library writes tensors: wide dtypes first, then by name as text."""
    return sorted(tensors, key=lambda tensor: (LIBRARY_DTYPES.index(tensor.dtype), tensor.name))


def _close_shards(stages: Sequence[Sequence[Tensor]], limit: int = ELEMENT_LIMIT) -> list[list[Tensor]]:
    # The demo's writer has the rule, and asks a tensor for nothing but its shape.
    return split(stages, limit)  # type: ignore[arg-type, return-value]


def _published(config: Mapping[str, Any], shards: Sequence[Sequence[Tensor]]) -> Layout:
    """Shards in the form of DeepSeek's writer."""
    made = tuple(
        lay_out(f"model-{number:05d}-of-{len(shards):06d}.safetensors", tensors)
        for number, tensors in enumerate(shards, start=1)
    )
    # Computed before the weights became FP8: two bytes for every element, scales included.
    total = 2 * sum(prod(tensor.shape) for tensor in chain.from_iterable(shards))
    return Layout(config=config, index=_index(made, total), shards=made)


def _index(shards: Iterable[ShardLayout], total_size: int, *, sort_keys: bool = False) -> bytes:
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=sort_keys).encode()


def _v3_stage(layers: Iterable[int]) -> list[Tensor]:
    tensors = [_embedding(V3_CONFIG)] if 0 in layers else []
    return tensors + [tensor for number in layers for tensor in _layer(V3_CONFIG, number)]


def _last_v3_stage() -> list[Tensor]:
    """The last layers, final norm and head, and then the MTP layer."""
    return _v3_stage(range(STAGES[-1].stop, V3_CONFIG["num_hidden_layers"])) + _head(V3_CONFIG) + _mtp(V3_CONFIG)


def _mtp(config: Mapping[str, Any]) -> list[Tensor]:
    """The layer that predicts a token further, with copies of embedding and head."""
    hidden, vocab, number = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    tensors = list(_layer(config, number))
    for name, shape in (
        ("enorm", (hidden,)),
        ("hnorm", (hidden,)),
        ("eh_proj", (hidden, 2 * hidden)),
        ("embed_tokens", (vocab, hidden)),
        ("shared_head.norm", (hidden,)),
        ("shared_head.head", (vocab, hidden)),
    ):
        tensors.append(Tensor(f"model.layers.{number}.{name}.weight", "BF16", shape))
    return tensors


def _embedding(config: Mapping[str, Any]) -> Tensor:
    return Tensor("model.embed_tokens.weight", "BF16", (config["vocab_size"], config["hidden_size"]))


def _head(config: Mapping[str, Any]) -> list[Tensor]:
    hidden = config["hidden_size"]
    head = Tensor("lm_head.weight", "BF16", (config["vocab_size"], hidden))
    return [Tensor("model.norm.weight", "BF16", (hidden,)), head]


def _layer(config: Mapping[str, Any], number: int) -> Iterator[Tensor]:
    """One layer in the order of its modules: attention, router, shared expert, routed experts, norms."""
    prefix, hidden, heads = f"model.layers.{number}.", config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    no_rope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    attention = f"{prefix}self_attn."
    if q_rank is None:
        yield from _matrix(config, f"{attention}q_proj", heads * (no_rope + rope), hidden)
    else:
        yield from _matrix(config, f"{attention}q_a_proj", q_rank, hidden)
        yield Tensor(f"{attention}q_a_layernorm.weight", "BF16", (q_rank,))
        yield from _matrix(config, f"{attention}q_b_proj", heads * (no_rope + rope), q_rank)
    yield from _matrix(config, f"{attention}kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield Tensor(f"{attention}kv_a_layernorm.weight", "BF16", (kv_rank,))
    yield from _matrix(config, f"{attention}kv_b_proj", heads * (no_rope + value), kv_rank)
    yield from _matrix(config, f"{attention}o_proj", hidden, heads * value)
    if number < config["first_k_dense_replace"]:
        yield from _mlp(config, f"{prefix}mlp", config["intermediate_size"])
    else:
        experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
        yield Tensor(f"{prefix}mlp.gate.weight", "BF16", (experts, hidden))
        if config["topk_method"] == "noaux_tc":
            yield Tensor(f"{prefix}mlp.gate.e_score_correction_bias", "F32", (experts,))
        yield from _mlp(config, f"{prefix}mlp.shared_experts", width * config["n_shared_experts"])
        for expert in range(experts):
            yield from _mlp(config, f"{prefix}mlp.experts.{expert}", width)
    yield Tensor(f"{prefix}input_layernorm.weight", "BF16", (hidden,))
    yield Tensor(f"{prefix}post_attention_layernorm.weight", "BF16", (hidden,))


def _mlp(config: Mapping[str, Any], name: str, width: int) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    yield from _matrix(config, f"{name}.gate_proj", width, hidden)
    yield from _matrix(config, f"{name}.up_proj", width, hidden)
    yield from _matrix(config, f"{name}.down_proj", hidden, width)


def _matrix(config: Mapping[str, Any], name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """A BF16 weight; or an FP8 weight and its scales, one for each block of 128 x 128."""
    if "quantization_config" not in config:
        yield Tensor(f"{name}.weight", "BF16", (rows, columns))
        return
    yield Tensor(f"{name}.weight", "F8_E4M3", (rows, columns))
    yield Tensor(f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128)))
