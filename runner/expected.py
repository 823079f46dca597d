"""The tensors that a config promises, with their shapes: of the main model, and of the MTP layer behind it.

Names and numbers only; block scales are not listed. This file must not know what a checkpoint has.

Shapes are [rows, columns] as they are stored. Source: DeepSeek-V3 README_WEIGHTS and modeling_deepseek.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from manifests.names import expert_prefix
from runner import split_kv
from runner.config import ModelConfig
from runner.split_kv import Names

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
Expected = Iterator[tuple[str, tuple[int, ...]]]


def main_tensors(config: ModelConfig, names: Names = frozenset()) -> Expected:
    """Those of the main model.

    Args:
        config: The model.
        names: What there is, for what may be there in two forms.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    yield f"{EMBEDDING}.weight", vocabulary
    for layer in range(config.num_hidden_layers):
        yield from _decoder_layer(config, layer, names)
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield f"{HEAD}.weight", vocabulary


def head_of(config: ModelConfig) -> str:
    """Name of the head, which may be the embedding."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def _decoder_layer(config: ModelConfig, layer: int, names: Names) -> Expected:
    prefix, hidden = f"model.layers.{layer}.", config.hidden_size
    yield from _attention(config, f"{prefix}self_attn", names)
    if layer < config.first_k_dense_replace:
        yield from _mlp(f"{prefix}mlp.", config.intermediate_size, hidden)
    else:
        yield f"{prefix}mlp.gate.weight", (config.n_routed_experts, hidden)
        if config.topk_method == "noaux_tc":
            yield f"{prefix}mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
        if config.n_shared_experts:
            # Several shared experts are stored as one MLP of their widths' sum.
            width = config.moe_intermediate_size * config.n_shared_experts
            yield from _mlp(f"{prefix}mlp.shared_experts.", width, hidden)
        for expert in range(config.n_routed_experts):
            yield from _mlp(expert_prefix(layer, expert), config.moe_intermediate_size, hidden)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", (hidden,)


def _attention(config: ModelConfig, prefix: str, names: Names) -> Expected:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    queries = heads * config.qk_head_dim
    if rank is None:
        yield f"{prefix}.q_proj.weight", (queries, hidden)
    else:
        yield f"{prefix}.q_a_proj.weight", (rank, hidden)
        yield f"{prefix}.q_a_layernorm.weight", (rank,)
        yield f"{prefix}.q_b_proj.weight", (queries, rank)
    latent, nope, value = config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (latent + config.qk_rope_head_dim, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (latent,)
    if (parts := split_kv.halves(f"{prefix}.kv_b_proj.weight", names)) is None:
        yield f"{prefix}.kv_b_proj.weight", (heads * (nope + value), latent)
    else:
        k_b, v_b = parts
        yield k_b, (heads, latent, nope)
        yield v_b, (heads, value, latent)
    yield f"{prefix}.o_proj.weight", (hidden, heads * value)


def _mlp(prefix: str, width: int, hidden: int) -> Expected:
    yield f"{prefix}gate_proj.weight", (width, hidden)
    yield f"{prefix}up_proj.weight", (width, hidden)
    yield f"{prefix}down_proj.weight", (hidden, width)


def mtp_tensors(config: ModelConfig, names: Names = frozenset()) -> Expected:
    """Those of the MTP layer, without its copies of embedding and head; see `main_tensors`."""
    layer, hidden = config.num_hidden_layers, config.hidden_size
    prefix = f"model.layers.{layer}."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}{name}.weight", (hidden,)
    yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
    yield from _decoder_layer(config, layer, names)


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Names of the MTP layer's copies of embedding and head, each with what it is a copy of."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    return {
        f"{prefix}embed_tokens.weight": f"{EMBEDDING}.weight",
        f"{prefix}shared_head.head.weight": f"{head_of(config)}.weight",
    }
