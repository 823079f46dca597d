"""A small manifest that uses every key of the format, its digests computed by a second reading of FORMAT.md."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest

ONE, TWO = "model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"


def sha(text: str) -> str:
    """A digest of something that is not here."""
    return hashlib.sha256(text.encode()).hexdigest()


def of_raw(*digests: str) -> str:
    """The digest of raw digests one after the other."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def tensor(name: str, dtype: str, shape: list[int], offset: int, size: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape, "offset": offset, "size": size, "digest": sha(name)} | more


def file(path: str, kind: str, size: int, tensors: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    header = sha(f"header of {path}")
    return {
        "path": path,
        "kind": kind,
        "size": size,
        "header_size": 4096,
        "header_sha256": header,
        "digest": of_raw(header, *(tensor["digest"] for tensor in tensors)),
        "tensors": tensors,
    } | more


def packed(path: str, role: str, source_name: str) -> dict[str, Any]:
    return {
        "path": path,
        "role": role,
        "size": 50,
        "sha256": sha(path),
        "codec": "zstd",
        "content_size": 700,
        "content_sha256": sha(f"content of {path}"),
        "source_name": source_name,
    }


def build() -> dict[str, Any]:
    expert = "model.layers.3.mlp.experts.{}.{}_proj.weight"
    chunks = [sha("first chunk"), sha("second chunk")]
    big = tensor(expert.format(7, "up"), "F8_E4M3", [4097, 4096], 4096, 16_781_312, chunks=chunks)
    big["digest"] = of_raw(*chunks)
    scale = tensor(f"{big['name']}_scale_inv", "F32", [33, 32], 4096 + 16_781_312, 4224)
    cold = tensor(expert.format(8, "up"), "BF16", [2, 3], 4096, 12)
    blocks = {"encoding": "q8_0", "logical_shape": [4, 32], "source_name": "blk.3.attn_q.weight"}
    dense = [
        tensor("model.layers.3.self_attn.q_proj.weight", "U8", [136], 4096, 136, **blocks),
        tensor("model.layers.3.input_layernorm.weight", "BF16", [0], 4232, 0),
    ]
    return {
        "format": "expert-reshard-manifest",
        "version": 1,
        "layout": "resharded",
        "model": {
            "model_type": "deepseek_v3",
            "num_hidden_layers": 61,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
        },
        "selection": {"layers": [3], "experts": [7, 8]},
        "files": [
            file("layers/03/dense.safetensors", "dense", 4232, dense, layer=3),
            file("layers/03/experts/007.safetensors", "expert", 4096 + 16_785_536, [big, scale], layer=3, expert=7),
            file("layers/03/experts/008.safetensors.zst", "expert", 99, [cold], layer=3, expert=8)
            | {"codec": "zstd", "stored_sha256": sha("stored"), "unpacked_size": 4108},
            file("model/head.safetensors", "head", 4100, [tensor("lm_head.weight", "BF16", [1, 2], 4096, 4)]),
        ],
        "documents": [
            {"path": "config.json", "role": "auxiliary", "size": 9, "sha256": sha("c"), "source_name": "config.json"},
            {"path": "model.safetensors.index.json", "role": "index", "size": 9, "sha256": sha("i")},
            packed("source/headers/1.zst", "source_header", ONE),
            packed("source/headers/2.zst", "source_header", TWO),
            packed("source/index.json.zst", "source_index", "model.safetensors.index.json"),
        ],
        "source": {
            "kind": "safetensors",
            "shards": [
                {"name": ONE, "size": 5, "sha256": None, "header": "source/headers/1.zst"},
                {"name": TWO, "size": 6, "sha256": sha("s"), "header": "source/headers/2.zst"},
            ],
        },
    }  # fmt: skip


GOOD = build()


@pytest.fixture
def good() -> dict[str, Any]:
    """A valid manifest as a document, to be spoiled."""
    return copy.deepcopy(GOOD)
