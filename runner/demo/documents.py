"""The small files of the demo checkpoint: config, generation config, tokenizer config with chat template, README.

Keys and values are those of DeepSeek-V3's published files wherever the model's size does not ask for others. It knows
JSON and text; it must not import torch.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from runner.demo.tokenizer import ASSISTANT, BOS, BOS_ID, EOS, EOS_ID, USER

if TYPE_CHECKING:
    from runner.demo.parts import NetworkConfig

# A system text, the turns, and an opened answer, with nothing between them but the special tokens.
_CHAT_TEMPLATE = (
    "{% if add_generation_prompt is not defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages if message['role'] == 'system' %}"
    "{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '" + ASSISTANT + "' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)

_README = """\
# Demo checkpoint

A very small model in the published form of DeepSeek-V3: same architecture, names, stored types, shard rule and
number of shards, at 1/40,000 of the size. It continues Python code, clumsily; it is here so that every tool of this
repository can be tried, and tested, without a download. `python -m runner.demo.train` made it.

It was trained on nothing but the source of Python's standard library, which is copyright (c) 2001 Python Software
Foundation, all rights reserved, under the PSF License Agreement (https://docs.python.org/3/license.html). Text that
the model repeats from its memory stays under that licence.
"""


def documents(config: NetworkConfig) -> dict[str, str]:
    """Every file beside the shards, their index and tokenizer.json: name to text."""
    return {
        "config.json": _json(_config(config)),
        "generation_config.json": _json(_generation_config()),
        "tokenizer_config.json": _json(_tokenizer_config(config)),
        "README.md": _README,
    }


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _config(config: NetworkConfig) -> dict[str, Any]:
    """config.json with the original's keys, except `auto_map`, which names Python files that are not shipped."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "ep_size": 1,
        "first_k_dense_replace": config.first_k_dense_replace,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "kv_lora_rank": config.kv_lora_rank,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": config.n_group,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "norm_topk_prob": True,
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": config.beta_fast,
            "beta_slow": config.beta_slow,
            "factor": config.rope_factor,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": config.original_max_position_embeddings,
            "type": "yarn",
        },
        "rope_theta": config.rope_theta,
        "routed_scaling_factor": config.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": config.topk_group,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "v_head_dim": config.v_head_dim,
        "vocab_size": config.vocab_size,
    }


def _generation_config() -> dict[str, Any]:
    """As published with DeepSeek-R1; V3 itself has none."""
    return {
        "_from_model_config": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "transformers_version": "4.39.3",
    }


def _tokenizer_config(config: NetworkConfig) -> dict[str, Any]:
    def added(token: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": token, **flags}

    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": added(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": added(EOS),
        "legacy": True,
        "model_max_length": config.max_position_embeddings,
        "pad_token": added(EOS),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": _CHAT_TEMPLATE,
    }
