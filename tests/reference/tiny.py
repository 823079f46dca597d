"""Tiny random models with real names, and a store that counts what is asked of it.

How the numbers were chosen, so that a comparison of logits is not blind:

* Weights have a standard deviation of about 1/sqrt(fan-in), so that every block adds to the residual stream about
  as much as is there, attention scores spread by 1 to 2 and are far from uniform, and logits spread by 2 or more.
  (With the usual 0.02 all logits are nearly equal, and attention and experts could be left out unnoticed.)
* Every dimension is ragged against 128, and most matrices have more than 128 rows and columns: several blocks, the
  last one partial, both ways. Blocks have gains between 0.35 and 2.8, because random blocks of one gain
  have nearly equal scales, and a scale taken from the wrong block would not show.
* Key and value parts of a head differ in size, and no two sizes are equal by accident.
* Router rows are scaled up, so that the last chosen and the first rejected expert are far apart compared to
  rounding. Router biases are mostly negative: most biased scores are, too, and a group masked with 0.0 would win.
* Norm weights vary, so that leaving one out shows.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifests.errors import IncompleteError
from manifests.names import expert_prefix
from runner.fp8 import Matrix

Config = dict[str, Any]

_COMMON: Config = {
    "vocab_size": 288,
    "hidden_size": 200,
    "intermediate_size": 328,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 136,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 16,
    "v_head_dim": 36,
    "n_routed_experts": 16,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _yarn(factor: float, beta_fast: float, mscale: float) -> Config:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "beta_fast": beta_fast,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


FP8: Config = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

CONFIGS: dict[str, Config] = {
    "v3": _COMMON
    | {
        "model_type": "deepseek_v3",
        "q_lora_rank": 144,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_scaling": _yarn(40, 32, 1.0),
        "quantization_config": FP8,
    },
    # One group, and a ramp whose two ends coincide.
    "kimi": _COMMON
    | {
        "model_type": "kimi_k2",
        "q_lora_rank": 144,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000.0,
        "rope_scaling": _yarn(32, 1, 1.0),
        "quantization_config": FP8,
    },
    # No YaRN, no q-LoRA; rms_norm_eps far from 1e-6, so that it shows which norms take it.
    "moonlight": _COMMON
    | {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 0.05,
        "rope_theta": 50000.0,
        "rope_scaling": None,
    },
    "v2_lite": _COMMON
    | {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_scaling": _yarn(40, 32, 0.707),
    },
    "v2": _COMMON
    | {
        "model_type": "deepseek_v2",
        "q_lora_rank": 144,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "rope_scaling": _yarn(40, 32, 0.707),
    },
}
"""As the families' config.json files have it, sizes apart."""


def make_weights(config: Config, quantize: Any, seed: int = 0) -> dict[str, Tensor]:
    """Random weights in their stored dtypes: FP8 with scales where config says so, else BF16; biases F32.

    Args:
        config: One of CONFIGS, or like it.
        quantize: The FP8 quantiser of this folder.
        seed: Of the weights.
    """
    made = _Maker(config, quantize, seed)
    made.tensors["model.embed_tokens.weight"] = made.normal(config["vocab_size"], config["hidden_size"]).bfloat16()
    for layer in range(config["num_hidden_layers"]):
        made.layer(layer)
    made.norm("model.norm", config["hidden_size"])
    made.matrix("lm_head", config["vocab_size"], config["hidden_size"], 2.0, plain=True)
    return made.tensors


def make_mtp_weights(config: Config, quantize: Any, seed: int = 1) -> dict[str, Tensor]:
    """The MTP layer behind them, without copies of embedding and head."""
    made, hidden, layer = _Maker(config, quantize, seed), config["hidden_size"], config["num_hidden_layers"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        made.norm(f"model.layers.{layer}.{name}", hidden)
    made.matrix(f"model.layers.{layer}.eh_proj", hidden, 2 * hidden, 1.5, plain=True)
    made.layer(layer)
    return made.tensors


class _Maker:
    def __init__(self, config: Config, quantize: Any, seed: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._config = config
        self._quantize = quantize
        self._fp8 = config.get("quantization_config") is not None
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0, plain: bool = False) -> None:
        weight = self.normal(rows, columns) * gain * columns**-0.5
        if plain or not self._fp8:
            self.tensors[f"{name}.weight"] = weight.bfloat16()
            return
        gains = 2 ** (3 * torch.rand(-(-rows // 128), -(-columns // 128), generator=self._generator) - 1.5)
        weight *= gains.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        self.tensors[f"{name}.weight"], self.tensors[f"{name}.weight_scale_inv"] = self._quantize(weight)

    def norm(self, name: str, size: int) -> None:
        self.tensors[f"{name}.weight"] = (1 + 0.25 * self.normal(size)).bfloat16()

    def mlp(self, name: str, width: int) -> None:
        hidden = self._config["hidden_size"]
        self.matrix(f"{name}.gate_proj", width, hidden, 1.5)
        self.matrix(f"{name}.up_proj", width, hidden)
        self.matrix(f"{name}.down_proj", hidden, width, 1.5)

    def layer(self, layer: int) -> None:
        config, p = self._config, f"model.layers.{layer}"
        hidden, heads, experts = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
        nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        q_rank, kv_rank, width = config["q_lora_rank"], config["kv_lora_rank"], config["moe_intermediate_size"]
        if q_rank:
            self.matrix(f"{p}.self_attn.q_a_proj", q_rank, hidden)
            self.norm(f"{p}.self_attn.q_a_layernorm", q_rank)
            self.matrix(f"{p}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        else:
            self.matrix(f"{p}.self_attn.q_proj", heads * (nope + rope), hidden)
        self.matrix(f"{p}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        self.norm(f"{p}.self_attn.kv_a_layernorm", kv_rank)
        self.matrix(f"{p}.self_attn.kv_b_proj", heads * (nope + value), kv_rank)
        self.matrix(f"{p}.self_attn.o_proj", hidden, heads * value)
        if layer < config["first_k_dense_replace"]:
            self.mlp(f"{p}.mlp", config["intermediate_size"])
        else:
            self.matrix(f"{p}.mlp.gate", experts, hidden, 2.0, plain=True)
            if config["topk_method"] == "noaux_tc":
                self.tensors[f"{p}.mlp.gate.e_score_correction_bias"] = 0.3 * self.normal(experts) - 0.7
            for expert in range(experts):
                self.mlp(f"{p}.mlp.experts.{expert}", width)
            if config["n_shared_experts"]:
                self.mlp(f"{p}.mlp.shared_experts", width * config["n_shared_experts"])
        self.norm(f"{p}.input_layernorm", hidden)
        self.norm(f"{p}.post_attention_layernorm", hidden)


def expand(tensors: dict[str, Tensor], dequantize: Any) -> dict[str, Tensor]:
    """The same weights as float32 without scales, expanded by the given function of this folder."""
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale_inv"):
            continue
        scale = tensors.get(f"{name}_scale_inv")
        plain[name] = tensor.float() if scale is None else dequantize(tensor, scale)
    return plain


class DictStore:
    """The dict-backed twin of the runner's weight store; ``asked`` counts every tensor that was wanted."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.asked: Counter[str] = Counter()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        self.asked[name] += 1
        if name not in self._tensors:
            raise IncompleteError(f"there is no tensor {name}")
        return self._tensors[name]

    def matrix(self, prefix: str) -> Matrix:
        weight, scale_name = self.tensor(f"{prefix}.weight"), f"{prefix}.weight_scale_inv"
        return Matrix(weight=weight, scale=self.tensor(scale_name) if scale_name in self else None)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def rows(self, name: str, ids: Sequence[int]) -> Matrix:
        return Matrix(weight=self.tensor(name)[list(ids)], scale=None, name=name)

    def expert_groups(self, layer: int, experts: Sequence[int]) -> Iterator[Iterator[list["DictExpert"]]]:
        yield iter([[DictExpert(key=(layer, expert), tensors=self._expert(layer, expert)) for expert in experts]])

    def begin_pass(self) -> None:
        pass

    def _expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        prefix = expert_prefix(layer, expert)
        names = [f"{prefix}{projection}.weight" for projection in ("gate_proj", "up_proj", "down_proj")]
        scales = [f"{name}_scale_inv" for name in names if f"{name}_scale_inv" in self]
        return {name: self.tensor(name) for name in (*names, *scales)}


@dataclass
class DictExpert:
    """One routed expert of a DictStore."""

    key: tuple[int, int]
    tensors: dict[str, Tensor]
    prepared: Any = None

    def encoding(self, name: str) -> str:
        return "plain"
