"""DeepSeek-V2-Lite as one GGUF file of true shapes, with the types of a Q4_K_M file and random blocks.

    python tests/benchmarks/make_gguf.py OUT.gguf [--moe-layers N] [--type Q4_K_M|Q8_0] [--seed S]

All 27 layers are 10.4 GB, or 16.7 GB as Q8_0. Types follow llama.cpp's mixture: Q6_K or Q4_K by layer for what projects
down, Q5_0 and Q8_0 in their place where a row is no whole number of 256. Bits are random; the factors of each block are
such that weights have a mean of nought and the deviation that the model was initialised with. There is no tokenizer:
give ids. The same options give the same bytes. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from layouts import V2_LITE_CONFIG
from report import finish, say

DEVIATION = 0.02
"""The model's initializer_range."""

_FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}

# By type: where a block has its factors, in float16, such that random bits have the deviation 1. A uniform number of
# n levels deviates by n / sqrt(12). Q4_K: d s q - dmin m, of s and m in 0..63 and q in 0..15, with dmin 7.5 d.
_Q4_K = 1 / sqrt(1333.5 * 77.5 - (31.5 * 7.5) ** 2 + 7.5**2 * 341.25)
_FACTORS: dict[Type, tuple[tuple[int, float], ...]] = {
    Type.Q4_0: ((0, sqrt(12) / 16),),
    Type.Q5_0: ((0, sqrt(12) / 32),),
    Type.Q8_0: ((0, sqrt(12) / 256),),
    Type.Q4_K: ((0, _Q4_K), (2, 7.5 * _Q4_K)),
    Type.Q6_K: ((208, 12 / 64 / 256),),
}
_SLAB_BYTES = 64 << 20


def main() -> int:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--moe-layers", type=int, default=26)
    parser.add_argument("--type", choices=("Q4_K_M", "Q8_0"), default="Q4_K_M")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = V2_LITE_CONFIG | {"num_hidden_layers": 1 + options.moe_layers}
    begin = time.perf_counter()
    planned = list(tensors(config, is_q8=options.type == "Q8_0"))
    writer = gguf.GGUFWriter(options.out, "deepseek2")
    describe(writer, config)
    for name, shape, kind in planned:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        stored = (*shape[:-1], shape[-1] // elements * size)
        as_bytes = np.dtype(np.float32) if kind is Type.F32 else np.dtype(np.uint8)
        writer.add_tensor_info(
            name, shape if kind is Type.F32 else stored, as_bytes, nbytes(shape, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    chance = np.random.default_rng(options.seed)
    for name, shape, kind in planned:
        writer.write_tensor_data(values(chance, name, shape, kind))
    writer.close()
    size = options.out.stat().st_size
    say(f"{size / 1e9:.2f} GB, {len(planned)} tensors, to {options.out}")
    finish("gguf: v2-lite", {"bytes": size, "tensors": len(planned), "seconds": time.perf_counter() - begin})
    return 0


def nbytes(shape: tuple[int, ...], kind: Type) -> int:
    """Bytes of a tensor."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // elements * size


def describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The metadata that the converter writes, in the generation that has kv_b_proj whole."""
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    scaling = config["rope_scaling"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_attention_heads"])
    writer.add_key_length(nope + rope)
    writer.add_value_length(config["v_head_dim"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(float(config["routed_scaling_factor"]))
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def tensors(config: dict[str, Any], *, is_q8: bool) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Name, shape and type of every tensor."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    experts, width, layers = config["n_routed_experts"], config["moe_intermediate_size"], config["num_hidden_layers"]

    def matrix(name: str, *shape: int, more: bool = False) -> tuple[str, tuple[int, ...], Type]:
        kind = Type.Q8_0 if is_q8 else Type.Q6_K if more else Type.Q4_K
        return f"{name}.weight", shape, _FALLBACK[kind] if shape[-1] % 256 and kind in _FALLBACK else kind

    def vector(name: str, *shape: int) -> tuple[str, tuple[int, ...], Type]:
        return f"{name}.weight", shape, Type.F32

    yield matrix("token_embd", config["vocab_size"], hidden)
    for layer in range(layers):
        block = f"blk.{layer}"
        # The first and the last eighth, and each third between, of what projects down.
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        yield vector(f"{block}.attn_norm", hidden)
        yield matrix(f"{block}.attn_q", heads * (nope + rope), hidden)
        yield matrix(f"{block}.attn_kv_a_mqa", rank + rope, hidden)
        yield vector(f"{block}.attn_kv_a_norm", rank)
        yield matrix(f"{block}.attn_kv_b", heads * (nope + value), rank)
        yield matrix(f"{block}.attn_output", hidden, heads * value)
        yield vector(f"{block}.ffn_norm", hidden)
        if layer < config["first_k_dense_replace"]:
            yield matrix(f"{block}.ffn_gate", config["intermediate_size"], hidden)
            yield matrix(f"{block}.ffn_up", config["intermediate_size"], hidden)
            yield matrix(f"{block}.ffn_down", hidden, config["intermediate_size"], more=more)
            continue
        shared = config["n_shared_experts"] * width
        yield vector(f"{block}.ffn_gate_inp", experts, hidden)
        yield matrix(f"{block}.ffn_gate_exps", experts, width, hidden)
        yield matrix(f"{block}.ffn_up_exps", experts, width, hidden)
        yield matrix(f"{block}.ffn_down_exps", experts, hidden, width, more=more)
        yield matrix(f"{block}.ffn_gate_shexp", shared, hidden)
        yield matrix(f"{block}.ffn_up_shexp", shared, hidden)
        yield matrix(f"{block}.ffn_down_shexp", hidden, shared, more=more)
    yield vector("output_norm", hidden)
    yield matrix("output", config["vocab_size"], hidden, more=True)


def values(chance: np.random.Generator, name: str, shape: tuple[int, ...], kind: Type) -> np.ndarray[Any, Any]:
    """Random values of a tensor, as they are stored."""
    if kind is Type.F32:
        found = chance.normal(0, DEVIATION, shape).astype(np.float32)
        return found if "gate_inp" in name else 1 + found
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.empty(nbytes(shape, kind), dtype=np.uint8)
    for begin in range(0, raw.size, _SLAB_BYTES):
        raw[begin : begin + _SLAB_BYTES] = np.frombuffer(chance.bytes(min(_SLAB_BYTES, raw.size - begin)), np.uint8)
    blocks = raw.reshape(-1, size)
    for offset, factor in _FACTORS[kind]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(factor * DEVIATION).tobytes(), np.uint8)
    return raw.reshape(*shape[:-1], -1)


if __name__ == "__main__":
    sys.exit(main())
