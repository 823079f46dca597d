"""Small valid documents to mutate: headers, indexes, configs, manifests and a journal, all made by chance from a seed.

Digests and offsets are computed by a second reading of FORMAT.md, so that no bug of the product hides here. What fits
them to a document takes a mutated one too: it mends what it can, and leaves the rest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
from math import prod
from random import Random
from typing import Any

Tree = dict[str, Any]

BITS = {"F4": 4, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "BF16": 16, "F16": 16, "I32": 32, "F32": 32, "F64": 64, "I64": 64}
NAMES = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.{0}.self_attn.q_proj.weight",
    "model.layers.{0}.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.{0}.input_layernorm.weight",
    "model.layers.{0}.mlp.gate.weight",
    "model.layers.{0}.mlp.gate.e_score_correction_bias",
    "model.layers.{0}.mlp.shared_experts.up_proj.weight",
    "model.layers.{0}.mlp.experts.{1}.gate_proj.weight",
    "model.layers.{0}.mlp.experts.{1}.up_proj.weight",
    "model.layers.{0}.mlp.experts.{1}.down_proj.weight",
    "model.layers.{0}.shared_head.head.weight",
    "model.layers.{0}.mystery.{1}.gain",
    "vision.{0}.proj",
    "\u6a21\u578b.{0}\U0001f600",
)
PAGE = 4096
CHUNK = 16 << 20
ZEROS = "0" * 64
_DIGEST_FIELD = re.compile(rb'"manifest_sha256":"[0-9a-f]{64}"')


def sha(text: str | bytes) -> str:
    """The sha256 of a text; for digests of things that are not here, of their name."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def of_raw(digests: list[str]) -> str:
    """The digest of raw digests one after the other."""
    return sha(b"".join(bytes.fromhex(digest) for digest in digests))


def tensors(chance: Random, count: int) -> list[tuple[str, str, list[int], int]]:
    """Name, dtype, shape and size of tensors with different names, FP8 weights with their scales."""
    found: dict[str, tuple[str, str, list[int], int]] = {}
    while len(found) < count:
        name = chance.choice(NAMES).format(chance.choice((0, 1, 3, 61, 9999)), chance.choice((0, 7, 255)))
        dtype = chance.choice(tuple(BITS))
        shape = [chance.choice((0, 1, 2, 2, 3, 4, 128, 131)) for _ in range(chance.choice((0, 1, 2, 2, 3)))]
        if BITS[dtype] * prod(shape) % 8:
            shape.append(2)
        found[name] = (name, dtype, shape, BITS[dtype] * prod(shape) // 8)
        if dtype == "F8_E4M3":
            found[f"{name}_scale_inv"] = (f"{name}_scale_inv", "F32", [1, 1], 4)
    return list(found.values())


def header(chance: Random, given: list[tuple[str, str, list[int], int]] | None = None) -> Tree:
    """A header's document."""
    document: Tree = {"__metadata__": {"format": "pt"}} if chance.random() < 0.7 else {}
    position = 0
    for name, dtype, shape, size in tensors(chance, chance.randint(0, 5)) if given is None else given:
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return document


def fit_header(document: Tree) -> None:
    """Make offsets follow each other and shapes fill them, where there is something to count with."""
    position = 0
    for entry in document.values():
        if isinstance(entry, dict) and (size := _size(entry.get("dtype"), entry.get("shape"))) is not None:
            entry["data_offsets"] = [position, position + size]
            position += size


def payload_size(document: Any) -> int:
    """The largest end in a header's document: the bytes that must follow it."""
    ends = [0]
    for entry in document.values() if isinstance(document, dict) else ():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int:
            ends.append(offsets[1])
    return max(ends)


def frame_header(text: bytes) -> bytes:
    """Header bytes: length and JSON."""
    return struct.pack("<Q", len(text)) + text


def _size(dtype: Any, shape: Any) -> int | None:
    if not isinstance(shape, list) or not all(type(number) is int for number in shape) or len(shape) > 64:
        return None
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    return None if bits is None else bits * prod(shape) // 8


def config(chance: Random) -> Tree:
    """A config.json that the runner knows as well."""
    return {
        "model_type": chance.choice(("deepseek_v3", "deepseek_v3", "kimi_k2")),
        "vocab_size": 300,
        "hidden_size": 72,
        "intermediate_size": 96,
        "moe_intermediate_size": 40,
        "num_hidden_layers": chance.randint(1, 61),
        "num_attention_heads": 2,
        "q_lora_rank": chance.choice((None, 24)),
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 512,
        "rope_theta": 10000,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "mscale": 1.0},
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "eos_token_id": chance.choice((1, [1, 2])),
    }


def manifest(chance: Random) -> Tree:
    """A manifest's document without its own digest fitted; see `fit_manifest` and `seal`."""
    widths = chance.choice((1, 2, 4))
    places: dict[str, Tree] = {}
    for _ in range(chance.randint(1, 3)):
        layer, expert = chance.randint(0, 9), chance.randint(0, 9)
        folder = f"layers/{layer:0{widths}d}"
        kind = chance.choice(("expert", "expert", "dense", "embed", "head"))
        if kind == "expert":
            places[f"{folder}/experts/{expert:0{widths}d}.safetensors"] = {
                "kind": kind,
                "layer": layer,
                "expert": expert,
            }
        elif chance.random() < 0.5:
            places[f"{folder}/{kind}.safetensors"] = {"kind": kind, "layer": layer}
        else:
            places[f"model/{kind}.safetensors"] = {"kind": kind}
    files = []
    for number, path in enumerate(sorted(places)):
        # The number makes names unique over the files.
        entries = [
            {"name": f"{name}.{number}" if number else name, "dtype": dtype, "shape": shape}
            for name, dtype, shape, _ in tensors(chance, chance.randint(0, 3))
        ]
        files.append(
            {"path": path, **places[path], "header_size": PAGE, "header_sha256": sha(path), "tensors": entries}
        )
    _vary(chance, files)
    shards = [f"model-{number}-of-2.safetensors" for number in range(chance.randint(1, 2))]
    partial = chance.random() < 0.5
    document: Tree = {
        "format": "expert-reshard-manifest",
        "version": 1,
        "layout": "resharded",
        "model": {
            "model_type": "deepseek_v3",
            "num_hidden_layers": 61,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
        },
        "selection": {"layers": [0, 3] if partial else None, "experts": None},
        "files": files,
        "documents": [
            {"path": "config.json", "role": "auxiliary", "size": 9, "sha256": sha("c"), "source_name": "config.json"},
            {"path": "model.safetensors.index.json", "role": "index", "size": 9, "sha256": sha("i")},
            *(_packed(f"source/headers/{number}.zst", name) for number, name in enumerate(shards)),
        ],
        "source": {
            "kind": "safetensors",
            "shards": [
                {
                    "name": name,
                    "size": 5000,
                    "sha256": None if partial else sha(name),
                    "header": f"source/headers/{number}.zst",
                }
                for number, name in enumerate(shards)
            ],
        },
        "manifest_sha256": ZEROS,
    }
    fit_manifest(document)
    return document


def _packed(path: str, source_name: str) -> Tree:
    return {
        "path": path,
        "role": "source_header",
        "size": 50,
        "sha256": sha(path),
        "codec": "zstd",
        "content_size": 700,
        "content_sha256": sha(source_name),
        "source_name": source_name,
    }


def _vary(chance: Random, files: list[Tree]) -> None:
    """The parts of the format that few files have: chunks, an encoding, a codec."""
    entries = [entry for file in files for entry in file["tensors"]]
    if entries and chance.random() < 0.1:
        chance.choice(entries).update(dtype="F8_E4M3", shape=[4097, 4096], chunks=[sha("first"), sha("second")])
    if entries and chance.random() < 0.2:
        chance.choice(entries).update(encoding="q8_0", logical_shape=[4, 32], source_name=f"blk.{chance.randint(0, 9)}")
    if chance.random() < 0.2:
        file = chance.choice(files)
        file.update(path=file["path"] + ".zst", codec="zstd", stored_sha256=sha("stored"), size=99)


def fit_manifest(document: Tree) -> None:
    """Fit sizes, offsets and digests of digests to dtypes, shapes and chunks, as far as the document has form."""
    files = document.get("files")
    for file in files if isinstance(files, list) else ():
        if not isinstance(file, dict):
            continue
        position = file.get("header_size")
        digests = [file.get("header_sha256")]
        entries = file.get("tensors")
        for entry in entries if isinstance(entries, list) else ():
            size = _size(entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else None
            if size is None or type(position) is not int:
                continue
            entry |= {"size": size, "offset": position, "digest": sha(repr(entry.get("name")))}
            chunks = entry.get("chunks")
            if isinstance(chunks, list) and all(map(_is_hex, chunks)):
                entry["digest"] = of_raw(chunks)
            digests.append(entry["digest"])
            position += size
        if all(map(_is_hex, digests)):
            file["digest"] = of_raw(digests)
        file["unpacked_size" if "codec" in file else "size"] = position


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def seal(raw: bytes) -> bytes:
    """Recompute manifest_sha256, where the bytes have one field of that form."""
    zeroed = _DIGEST_FIELD.sub(b'"manifest_sha256":"' + ZEROS.encode() + b'"', raw)
    return _DIGEST_FIELD.sub(f'"manifest_sha256":"{sha(zeroed)}"'.encode(), raw)


def journal(chance: Random) -> list[Tree]:
    """The records of a journal; see `chain`."""
    shards = [f"model-{number}-of-3.safetensors" for number in range(3)]
    first = {
        "version": 1,
        "task": "run",
        "selection": {"layers": None, "experts": None},
        "consume": chance.random() < 0.5,
        "shards": [{"name": name, "size": 5000} for name in shards],
    }
    done = [
        {"shard": name, "sha256": sha(name), "tensors": {entry[0]: [sha(entry[0])] for entry in tensors(chance, 2)}}
        for name in shards[: chance.randint(0, 3)]
    ]
    return [first, *done]


def chain(records: list[bytes]) -> bytes:
    """The lines of a journal: each record, as canonical JSON, with the check that ties it to the one before."""
    check, lines = "", []
    for record in records:
        check = sha(check.encode() + record)
        lines.append(b'{"check":"' + check.encode() + b'","record":' + record + b"}\n")
    return b"".join(lines)


@functools.cache
def folder(number: int) -> dict[str, tuple[bytes, int]]:
    """One of a few small checkpoints: each file's bytes, and for shards the size of the payload behind them."""
    chance = Random(f"folder {number}")
    entries = tensors(chance, 9)
    cut = chance.randint(2, 6)
    shards = {"model-1-of-2.safetensors": entries[:cut], "model-10-of-2.safetensors": entries[cut:]}
    if number == 0:
        shards = {"model.safetensors": entries}
    made = {}
    for name, part in shards.items():
        document = header(chance, part)
        made[name] = frame_header(json.dumps(document).encode()), payload_size(document)
    if number:
        weight_map = {entry[0]: name for name, part in shards.items() for entry in part}
        made["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode(), 0
    made["config.json"] = json.dumps(config(chance)).encode(), 0
    return made
