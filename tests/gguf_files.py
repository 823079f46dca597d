"""Tiny GGUF models of architecture deepseek2, written with the ggml project's own package.

The metadata and the forms of tensors are those of llama.cpp's converter in its two generations. Bytes are random, where
they must only be found where they are; `write_model` writes given weights, to compute with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from manifests.gguf_names import Stack, to_hugging_face

Config = Mapping[str, Any]
Data = Callable[[str, tuple[int, ...], Type], tuple[Type, np.ndarray]]
"""Gives type and stored bytes of a tensor, of its name, its shape and the type that `tensors` has for it."""

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "bos_token_id": 3,
    "eos_token_id": 5,
}


def metadata(config: Config, *, new: bool, router: bool = True) -> dict[str, Any]:
    """What the converter writes for a config.json, by key without the architecture before it.

    Args:
        config: Of the model.
        new: Whether the converter is one of those that cut kv_b_proj in two.
        router: Whether it is one that writes how experts are chosen.
    """
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    rank = config["kv_lora_rank"]
    found: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": 1 if new else config["num_attention_heads"],
        "rope.freq_base": config["rope_theta"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "expert_used_count": config["num_experts_per_tok"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "vocab_size": config["vocab_size"],
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope if new else nope + rope,
        "attention.value_length": rank if new else value,
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "rope.dimension_count": rope,
    }
    if new:
        found |= {"attention.key_length_mla": nope + rope, "attention.value_length_mla": value}
    if config["q_lora_rank"] is not None:
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    if router:
        found["expert_gating_func"] = 1 if config["scoring_func"] == "softmax" else 2
        found |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    if config["norm_topk_prob"]:
        found["expert_weights_norm"] = True
    if (scaling := config["rope_scaling"]) is not None:
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"],
        }
        if new:
            found |= {f"rope.scaling.yarn_{key}": float(scaling[key]) for key in ("beta_fast", "beta_slow")}
    return found


def tensors(config: Config, *, new: bool, fused: bool = False) -> list[tuple[str, tuple[int, ...], Type]]:
    """Name, shape and type of every tensor, in an order that has experts before and behind others."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    found = [("token_embd.weight", (config["vocab_size"], hidden), Type.Q4_K)]
    for layer in range(config["num_hidden_layers"]):
        of_layer: list[tuple[str, tuple[int, ...], Type]] = [
            ("attn_norm.weight", (hidden,), Type.F32),
            ("attn_kv_a_mqa.weight", (rank + rope, hidden), Type.Q6_K),
            ("attn_kv_a_norm.weight", (rank,), Type.F32),
            ("attn_output.weight", (hidden, heads * value), Type.BF16),
            ("ffn_norm.weight", (hidden,), Type.F32),
        ]
        if config["q_lora_rank"] is None:
            of_layer += [("attn_q.weight", (heads * (nope + rope), hidden), Type.Q5_K)]
        else:
            of_layer += [
                ("attn_q_a.weight", (config["q_lora_rank"], hidden), Type.IQ4_XS),
                ("attn_q_a_norm.weight", (config["q_lora_rank"],), Type.F32),
                ("attn_q_b.weight", (heads * (nope + rope), config["q_lora_rank"]), Type.Q8_0),
            ]
        if new:
            of_layer += [
                ("attn_k_b.weight", (heads, rank, nope), Type.Q8_0),
                ("attn_v_b.weight", (heads, value, rank), Type.Q5_0),
            ]
        else:
            of_layer += [("attn_kv_b.weight", (heads * (nope + value), rank), Type.F16)]
        if layer < config["first_k_dense_replace"]:
            of_layer += [
                ("ffn_down.weight", (hidden, config["intermediate_size"]), Type.Q2_K),
                ("ffn_gate.weight", (config["intermediate_size"], hidden), Type.Q4_K),
                ("ffn_up.weight", (config["intermediate_size"], hidden), Type.Q4_K),
            ]
        else:
            shared = config["n_shared_experts"] * width
            of_layer += [("ffn_gate_inp.weight", (experts, hidden), Type.F32)]
            of_layer += [("ffn_down_exps.weight", (experts, hidden, width), Type.Q5_1)]
            if fused:
                of_layer += [("ffn_gate_up_exps.weight", (experts, 2 * width, hidden), Type.Q4_K)]
            else:
                of_layer += [
                    ("ffn_gate_exps.weight", (experts, width, hidden), Type.Q4_K),
                    ("ffn_up_exps.weight", (experts, width, hidden), Type.Q8_0),
                ]
            of_layer += [
                ("ffn_down_shexp.weight", (hidden, shared), Type.IQ4_NL),
                ("ffn_gate_shexp.weight", (shared, hidden), Type.F16),
                ("ffn_up_shexp.weight", (shared, hidden), Type.MXFP4),
            ]
            if config["scoring_func"] == "sigmoid":
                of_layer += [("exp_probs_b.bias", (experts,), Type.F32)]
        found += [(f"blk.{layer}.{name}", shape, kind) for name, shape, kind in of_layer]
    found += [("output_norm.weight", (hidden,), Type.F32)]
    return [*found, ("output.weight", (config["vocab_size"], hidden), Type.Q6_K)]


def stored_bytes(name: str, shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """Bytes that follow from the name alone, as rows of whole blocks."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    stored = (*shape[:-1], shape[-1] // elements * size)
    raw = random.Random(name).randbytes(int(np.prod(stored)))
    return np.frombuffer(raw, dtype=np.uint8).reshape(stored)


def write_gguf(
    path: Path,
    config: Config = CONFIG,
    *,
    new: bool = True,
    router: bool = True,
    fused: bool = False,
    forms: Config | None = None,
    change: Mapping[str, Any] | None = None,
    data: Data | None = None,
    leave_out: Collection[str] = (),
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    **options: Any,
) -> dict[str, tuple[tuple[int, ...], Type, bytes]]:
    """Write a model.

    Args:
        path: Of the file, or of what the files of a split set are named after.
        config: What config.json says.
        new: See `metadata`.
        router: See `metadata`.
        fused: Whether gate and up are one stack.
        forms: A config with the sizes of tensors, where those of config would be too large to write.
        change: Metadata of another value; None for a key that is left out.
        data: What tensors are; random bytes when not given.
        leave_out: Names of tensors that are not written.
        tokenizer: Adds one. When not given, there are tokens that do not make one, and ids of those that begin and end
            a text; nothing when config says that none begins one.
        options: For `gguf.GGUFWriter`, such as ``split_max_tensors``.

    Returns:
        Shape, type and bytes of each tensor by its name in the file.
    """
    writer = gguf.GGUFWriter(path, "deepseek2", **options)
    for key, value in (metadata(config, new=new, router=router) | dict(change or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"deepseek2.{key}", value)
    if tokenizer is not None:
        tokenizer(writer)
    elif config["bos_token_id"] is not None:
        _add_tokens(writer, config)
    written = {}
    for name, shape, usual in tensors(forms or config, new=new, fused=fused):
        if name in leave_out:
            continue
        kind, stored = (usual, stored_bytes(name, shape, usual)) if data is None else data(name, shape, usual)
        written[name] = shape, kind, stored.tobytes()
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add_tokens(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}\u0120" for number in range(64)])
    writer.add_token_types([1] * 64)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


Kinds = Callable[[str, tuple[int, ...]], Type]
"""The type of a matrix, of its name in the file and its shape."""


def write_model(
    path: Path, config: Config, weights: Mapping[str, np.ndarray], kinds: Kinds, **options: Any
) -> dict[str, np.ndarray]:
    """Write a model of given weights.

    Args:
        path: Of the file, or of what the files of a split set are named after.
        config: What config.json says.
        weights: float32, by Hugging Face's names.
        kinds: The type of each matrix; vectors and the router's matrix are float32, as the converter has them.
        options: See `write_gguf`.

    Returns:
        What the file holds, expanded to float32, by Hugging Face's names. Of Q4_K and Q6_K, which the package cannot
        make, these are random blocks and not what was given.
    """
    held: dict[str, np.ndarray] = {}

    def data(name: str, shape: tuple[int, ...], _: Type) -> tuple[Type, np.ndarray]:
        is_plain = len(shape) == 1 or name.endswith("ffn_gate_inp.weight")
        kind = Type.F32 if is_plain else kinds(name, shape)
        if kind in _RANDOM:
            stored = _RANDOM[kind](np.random.default_rng(len(held)), shape)
        else:
            stored = gguf.quants.quantize(np.ascontiguousarray(_gather(name, shape, config, weights)), kind)
        _spread(name, gguf.quants.dequantize(stored, kind), held)
        return kind, stored

    write_gguf(path, config, data=data, **options)
    return _join_halves(held)


def read_model(path: Path) -> dict[str, np.ndarray]:
    """What a file holds, expanded to float32 by ggml's package, by Hugging Face's names."""
    held: dict[str, np.ndarray] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        _spread(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type), held)
    return _join_halves(held)


def _join_halves(held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name in [name for name in held if name.endswith(".k_b_proj.weight")]:
        k_b, v_b = held.pop(name), held.pop(name.replace(".k_b_proj.", ".v_b_proj."))
        # A head's rows for keys, which are columns here, then those for values.
        heads = [np.concatenate([k_b[head].T, v_b[head]]) for head in range(len(k_b))]
        held[name.replace(".k_b_proj.", ".kv_b_proj.")] = np.concatenate(heads)
    return held


def _gather(name: str, shape: tuple[int, ...], config: Config, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    target = to_hugging_face(name)
    if isinstance(target, Stack):
        found = np.stack([np.concatenate([weights[one] for one in target.names(e)]) for e in range(shape[0])])
    elif ".k_b_proj." in target or ".v_b_proj." in target:
        nope = config["qk_nope_head_dim"]
        whole = weights[target.replace(".k_b_proj.", ".kv_b_proj.").replace(".v_b_proj.", ".kv_b_proj.")]
        heads = np.split(whole, config["num_attention_heads"])
        found = np.stack([head[:nope].T if ".k_b_proj." in target else head[nope:] for head in heads])
    else:
        found = weights[target]
    assert found.shape == shape, name
    return found


def _spread(name: str, values: np.ndarray, held: dict[str, np.ndarray]) -> None:
    target = to_hugging_face(name)
    if isinstance(target, str):
        held[target] = values
        return
    for expert, matrix in enumerate(values):
        held.update(zip(target.names(expert), np.split(matrix, len(target.parts)), strict=True))


def _q4_k(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random blocks of values around 0 that spread by about 1/16: d and dmin, 12 bytes of six-bit scales, nibbles."""
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, 144), dtype=np.uint8)
    scales = np.array([2.8e-4, 7.5 * 2.8e-4], np.float16) * rng.uniform(0.5, 1.5, (*blocks.shape[:-1], 2))
    blocks[..., :4] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _q6_k(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """The same: numbers of six bits, sixteen signed bytes of scales, and a scale d of all at the end."""
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, 210), dtype=np.uint8)
    scales = 4.6e-5 * rng.uniform(0.5, 1.5, (*blocks.shape[:-1], 1))
    blocks[..., 208:] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


_RANDOM = {Type.Q4_K: _q4_k, Type.Q6_K: _q6_k}
