"""A checkpoint that is small and nasty: cut where it hurts, ragged, with an empty tensor, a hole, files in sub-folders.

Experts lie across shard boundaries, weights apart from their scales, and the dense part of layer 1 is open from the
second shard to the last. Bytes follow from names, so it is the same everywhere.
"""

from __future__ import annotations

import json
import random
import struct
from math import prod
from pathlib import Path

from harness.tree import write_sparse

from manifests.dtypes import nbytes
from manifests.header import read_header
from runner.demo.shards import StoredTensor, split, write

HIDDEN = 64
PAGE = 4096

AUXILIARY = {
    "tokenizer.json": '{"version": "1.0"}',
    "LICENSE": "Permission is hereby granted\r\n",
    "empty.txt": "",
    "figures/deep/benchmark 1.txt": "in a sub-folder of a sub-folder",
}
"""Beside config.json and the index."""
LEFT_OUT = {".cache/huggingface/x.metadata": "hidden", "pytorch_model.bin": "other weights"}


def build(folder: Path, *, layers: int = 2, experts: int = 4, elements: int = 17_000) -> Path:
    """Write the checkpoint into a new folder.

    Args:
        folder: Where to.
        layers: One dense layer, the others with experts.
        experts: In each layer.
        elements: At which a shard is closed.
    """
    folder.mkdir(parents=True)
    write(folder, shards(layers, experts, elements))
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    for path, text in (AUXILIARY | LEFT_OUT | {"config.json": json.dumps(config)}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, newline="")
    for shard in folder.glob("*.safetensors"):
        write_sparse(shard, shard.read_bytes())
    return folder


def build_gguf(folder: Path) -> Path:
    """Write a split set of two GGUF files into a new folder, each with padding between its tensors and at its end.

    Spelled out by hand: the workers import nothing that the product does not.
    """
    folder.mkdir(parents=True)
    stacks = [(f"ffn_{name}_exps.weight", sizes) for name, sizes in (("gate", (64, 67, 4)), ("down", (96, 64, 4)))]
    parts = (
        [
            ("token_embd.weight", (HIDDEN, 40)),
            ("blk.0.attn_norm.weight", (HIDDEN,)),
            ("blk.0.ffn_gate.weight", (64, 70)),
        ],
        [("blk.1.attn_norm.weight", (3,)), *((f"blk.1.{name}", sizes) for name, sizes in stacks), ("odd.bias", (5,))],
    )
    for number, tensors in enumerate(parts):
        facts = [_pair("split.no", _U16, number), _pair("split.count", _U16, len(parts))]
        facts.append(_pair("split.tensors.count", _I32, sum(map(len, parts))))
        facts += [_pair("general.architecture", _STRING, "deepseek2")] if number == 0 else []
        table, payload = b"", b""
        for name, sizes in tensors:
            table += _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, 0, len(payload))
            content = random.Random(name).randbytes(4 * prod(sizes))
            payload += content + bytes(-len(content) % _ALIGNMENT)
        header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts)) + b"".join(facts) + table
        raw = header + bytes(-len(header) % _ALIGNMENT) + payload
        (folder / f"model-{number + 1:05d}-of-{len(parts):05d}.gguf").write_bytes(raw)
    (folder / "LICENSE").write_text(AUXILIARY["LICENSE"], newline="")
    return folder


_U16, _I32, _STRING, _ALIGNMENT = 2, 5, 8, 32
"""Numbers of the GGUF format."""


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _pair(key: str, kind: int, value: int | str) -> bytes:
    content = _text(value) if isinstance(value, str) else struct.pack("<H" if kind == _U16 else "<i", value)
    return _text(key) + struct.pack("<I", kind) + content


def shards(layers: int, experts: int, elements: int) -> list[list[StoredTensor]]:
    """The tensors, shard by shard."""
    stage = [_tensor("model.embed_tokens.weight", "BF16", 40, HIDDEN), *_attention(0), *_mlp("model.layers.0.mlp", 70)]
    stage += _norms(0)
    for layer in range(1, layers):
        prefix = f"model.layers.{layer}.mlp"
        stage += [*_attention(layer), _tensor(f"{prefix}.gate.weight", "BF16", experts, HIDDEN)]
        stage += [_tensor(f"{prefix}.gate.e_score_correction_bias", "F32", experts)]
        stage += _mlp(f"{prefix}.shared_experts", 64)
        for expert in range(experts):
            # Whole pages, as in DeepSeek-V3, and not.
            stage += _mlp(f"{prefix}.experts.{expert}", (64, 67, 192, 130)[expert % 4])
        stage += _norms(layer)
    # A layer has this much of nothing: whole pages that are not stored, and a tensor without elements at the end.
    stage += [_tensor("model.norm.weight", "BF16", HIDDEN), _tensor("lm_head.weight", "BF16", 40, HIDDEN)]
    hole = StoredTensor(name="model.layers.1.gain", dtype="U8", shape=(6 * PAGE,), data=bytes(6 * PAGE))
    last = [hole, _tensor("model.layers.1.bias", "F32", 0, 7)]
    return [*split([stage], elements), last, [_tensor("model.layers.0.bias", "F32", 7, 0)]]


def _tensor(name: str, dtype: str, *shape: int) -> StoredTensor:
    return StoredTensor(name=name, dtype=dtype, shape=shape, data=random.Random(name).randbytes(nbytes(dtype, shape)))


def _fp8(prefix: str, rows: int, columns: int) -> list[StoredTensor]:
    scale = _tensor(f"{prefix}.weight_scale_inv", "F32", -(-rows // 128), -(-columns // 128))
    return [_tensor(f"{prefix}.weight", "F8_E4M3", rows, columns), scale]


def _mlp(prefix: str, width: int) -> list[StoredTensor]:
    return [
        *_fp8(f"{prefix}.gate_proj", width, HIDDEN),
        *_fp8(f"{prefix}.up_proj", width, HIDDEN),
        *_fp8(f"{prefix}.down_proj", HIDDEN, width),
    ]


def _attention(layer: int) -> list[StoredTensor]:
    prefix = f"model.layers.{layer}.self_attn"
    return [*_fp8(f"{prefix}.q_a_proj", 30, HIDDEN), *_fp8(f"{prefix}.o_proj", HIDDEN, 75)]


def _norms(layer: int) -> list[StoredTensor]:
    prefix = f"model.layers.{layer}"
    return [_tensor(f"{prefix}.{norm}_layernorm.weight", "BF16", HIDDEN) for norm in ("input", "post_attention")]


def element_counts(folder: Path) -> dict[str, int]:
    """Elements of each shard: how nasty it is can be read from it."""
    return {
        path.name: sum(prod(tensor.shape) for tensor in read_header(path).tensors)
        for path in sorted(folder.glob("*.safetensors"))
    }
