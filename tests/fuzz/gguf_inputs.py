"""GGUF files to mutate: small models of made-up sizes, and what is changed in them."""

from __future__ import annotations

import functools
from random import Random
from typing import Any

import gguf_bytes
from gguf_bytes import ARRAY, BOOL, F32, I32, SIZES, STRING, U16, U32
from mutate import mutate_bytes, mutate_tree

Tree = dict[str, Any]

PARTS = ("part-00001-of-00002.gguf", "part-00002-of-00002.gguf")
_PLAIN = (0, 1, 24, 30)
_LAYER = (
    "attn_norm.weight", "attn_q.weight", "attn_kv_b.weight", "attn_k_b.weight", "ffn_gate_inp.weight",
    "exp_probs_b.bias", "ffn_up_shexp.weight", "mystery.weight", "nextn.eh_proj.weight",
)  # fmt: skip
_STACKS = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight", "ffn_gate_up_exps.weight")


def metadata(chance: Random) -> list[Any]:
    """Pairs as the converter writes them."""
    integers = {
        "block_count": chance.randint(1, 61), "context_length": 4096, "embedding_length": 64, "vocab_size": 9,
        "feed_forward_length": 96, "attention.head_count": 2, "attention.head_count_kv": 1, "expert_used_count": 2,
        "leading_dense_block_count": 1, "attention.kv_lora_rank": 16, "attention.key_length": 24,
        "attention.value_length": 16, "attention.key_length_mla": 24, "attention.value_length_mla": 16,
        "expert_feed_forward_length": 32, "expert_count": chance.choice((4, 160, 256)), "expert_shared_count": 1,
        "rope.dimension_count": 8, "expert_gating_func": chance.choice((1, 2)), "expert_group_count": 2,
        "expert_group_used_count": 1, "rope.scaling.original_context_length": 64,
    }  # fmt: skip
    floats = {
        "rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-6, "expert_weights_scale": 2.5,
        "rope.scaling.factor": 40.0, "rope.scaling.yarn_log_multiplier": chance.choice((0.1, 0.0707)),
    }  # fmt: skip
    pairs = [["general.architecture", STRING, chance.choice(("deepseek2", "deepseek2", "deepseek2", "llama"))]]
    pairs += [[f"deepseek2.{key}", U32, value] for key, value in integers.items() if chance.random() < 0.9]
    pairs += [[f"deepseek2.{key}", F32, value] for key, value in floats.items() if chance.random() < 0.9]
    pairs += [["deepseek2.expert_weights_norm", BOOL, True], ["deepseek2.rope.scaling.type", STRING, "yarn"]]
    pairs += [["tokenizer.ggml.tokens", ARRAY, [STRING, ["a", "\u0120b", ""]]]]
    pairs += [["nested", ARRAY, [ARRAY, [[U32, [1, 2]], [F32, []]]]]]
    if chance.random() < 0.2:
        pairs.append(["general.alignment", U32, chance.choice((8, 32, 64))])
    return pairs


def tensors(chance: Random, names: list[str]) -> list[tuple[str, list[int], int]]:
    """Name, sizes and type of tensors with these names."""
    found = []
    for name in names:
        kind = chance.choice((*_PLAIN, *SIZES))
        row = SIZES[kind][0] * chance.choice((1, 1, 2, 3))
        dimensions = 3 if name.partition(".")[2].endswith(_STACKS) else chance.choice((1, 1, 2, 3))
        sizes = [row, *(chance.choice((1, 2, 2, 4, 6)) for _ in range(dimensions - 1))]
        found.append((name, sizes, kind))
    return found


def document(chance: Random, extra: list[Any] | None = None, only: range = range(4)) -> Tree:
    """A whole file's header."""
    names = ["token_embd.weight", "output.weight"][: 2 if 0 in only else 0]
    for layer in chance.sample(only, chance.randint(0, 2)):
        rests = chance.sample((*_LAYER, *_STACKS[:3]), chance.randint(0, 4))
        rests += [_STACKS[3]] if not {_STACKS[0], _STACKS[1]} & set(rests) and chance.random() < 0.3 else []
        names += [f"blk.{layer}.{rest}" for rest in rests]
    tree: Tree = {"version": chance.choice((2, 3, 3)), "pairs": [*metadata(chance), *(extra or [])]}
    tree["alignment"] = next((value for key, _, value in tree["pairs"] if key == "general.alignment"), 32)
    tree["tensors"] = [list(entry) for entry in gguf_bytes.place(tensors(chance, names), tree["alignment"])[0]]
    return tree


def fit(tree: Tree) -> None:
    """Make offsets follow each other again, and the padding fit, as far as there is something to count with."""
    found = [pair[2] for pair in gguf_bytes.as_list(tree.get("pairs")) if _is_alignment(pair)]
    tree["alignment"] = alignment = found[0] if found else 32
    position = 0
    for entry in gguf_bytes.as_list(tree.get("tensors")):
        if (size := _size(entry)) is not None:
            entry[3] = position
            position += size
            position += -position % alignment


def _is_alignment(pair: Any) -> bool:
    form = isinstance(pair, list) and len(pair) == 3 and pair[:2] == ["general.alignment", U32]
    return form and type(pair[2]) is int and 0 < pair[2] <= 4096


def _size(entry: Any) -> int | None:
    if not isinstance(entry, list) or len(entry) != 4 or not isinstance(entry[1], list) or len(entry[1]) > 9:
        return None
    sizes, kind = entry[1:3]
    if type(kind) is not int or kind not in SIZES or not all(type(size) is int and size >= 0 for size in sizes):
        return None
    return gguf_bytes.payload_size(sizes, kind)


def payload_size(tree: Tree) -> int:
    """The bytes that must follow the header."""
    ends = (
        entry[3] + size
        for entry in gguf_bytes.as_list(tree.get("tensors"))
        if (size := _size(entry)) is not None and type(entry[3]) is int
    )
    return min(max(ends, default=0), 2**62)


@functools.cache
def part(number: int) -> Tree:
    """One of two files of a split model."""
    chance = Random(f"part {number}")
    tree = document(chance, only=range(2) if number == 0 else range(2, 4))
    tree["pairs"] = [pair for pair in tree["pairs"] if number == 0 or not pair[0].startswith(("deep", "general"))]
    tree["pairs"] += [["split.no", U16, number], ["split.count", U16, 2]]
    fit(tree)
    return tree


def split_set() -> list[Tree]:
    """Both files, with the count of all tensors in each."""
    parts = [part(number) for number in range(2)]
    count = ["split.tensors.count", I32, sum(len(tree["tensors"]) for tree in parts)]
    return [tree | {"pairs": [*tree["pairs"], count]} for tree in parts]


def change(chance: Random, tree: Tree) -> tuple[bytes, int, list[str]]:
    """A file's header after a mutation, the bytes that follow it, and what was done."""
    kind = chance.random()
    if kind < 0.25:
        payload = payload_size(tree)
        raw, trail = mutate_bytes(chance, gguf_bytes.header(tree))
    elif kind < 0.35:
        raw, payload, trail = gguf_bytes.header(tree), payload_size(tree), ["as it was"]
    else:
        trail = mutate_tree(chance, tree)
        if chance.random() < 0.6:
            fit(tree)
            trail.append("fit")
        raw, payload = gguf_bytes.header(tree), payload_size(tree)
    if chance.random() < 0.3:
        payload += -payload % 32
    if chance.random() < 0.1:
        payload = max(0, payload + chance.choice((-1, 1, 32, -payload, 2**40)))
        trail.append("size")
    return raw, payload, trail
