"""Where each parameter of the network stands in the published checkpoint: names, stored types, order, pipeline stages.

The order is DeepSeek-V3's: the modules of a layer one after the other, attention first, norms last; the embedding
before everything, final norm and head after the last layer of the main model, then the MTP layer with its own copies
of embedding and head.

It knows names and parameters; it must not know files, bytes or FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from runner.demo.parts import NetworkConfig

FP8, BF16, F32 = "F8_E4M3", "BF16", "F32"


def _whole(parameter: Tensor) -> Tensor:
    return parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One published tensor; the scale of an FP8 tensor follows it and has no entry of its own.

    Attributes:
        name: Published name.
        dtype: How it is stored: FP8, BF16 or F32.
        key: Name in the network's state.
        part: Gives the published tensor as a view of that parameter, for reading and for writing.
    """

    name: str
    dtype: str
    key: str
    part: Callable[[Tensor], Tensor] = _whole


def stages(config: NetworkConfig) -> list[list[Entry]]:
    """The checkpoint as the pipeline stages that wrote it, each a list of entries in file order.

    The original's eight stages hold seven or eight whole layers each. This model has fewer layers than that: dense
    layers and the MTP layer are a stage each, and every other MoE layer makes two, cut between its experts.
    """
    result: list[list[Entry]] = []
    for layer in range(config.num_hidden_layers + 1):
        entries = list(_layer(layer, config))
        if layer < config.first_k_dense_replace or layer == config.num_hidden_layers:
            result.append(entries)
        else:
            first = f"model.layers.{layer}.mlp.experts.{config.n_routed_experts // 2}."
            cut = next(index for index, entry in enumerate(entries) if entry.name.startswith(first))
            result += [entries[:cut], entries[cut:]]
    result[0].insert(0, Entry(name="model.embed_tokens.weight", dtype=BF16, key="embed_tokens"))
    result[-2].append(Entry(name="model.norm.weight", dtype=BF16, key="norm"))
    result[-2].append(Entry(name="lm_head.weight", dtype=BF16, key="lm_head"))
    mtp = f"model.layers.{config.num_hidden_layers}."
    result[-1] += [
        Entry(name=f"{mtp}enorm.weight", dtype=BF16, key="enorm"),
        Entry(name=f"{mtp}hnorm.weight", dtype=BF16, key="hnorm"),
        Entry(name=f"{mtp}eh_proj.weight", dtype=BF16, key="eh_proj"),
        Entry(name=f"{mtp}embed_tokens.weight", dtype=BF16, key="embed_tokens"),
        Entry(name=f"{mtp}shared_head.norm.weight", dtype=BF16, key="shared_head_norm"),
        Entry(name=f"{mtp}shared_head.head.weight", dtype=BF16, key="lm_head"),
    ]
    return result


def _layer(layer: int, config: NetworkConfig) -> Iterator[Entry]:
    def plain(module: str, dtype: str) -> Entry:
        return Entry(name=f"model.layers.{layer}.{module}.weight", dtype=dtype, key=f"layers.{layer}.{module}")

    yield plain("self_attn.q_a_proj", FP8)
    yield plain("self_attn.q_a_layernorm", BF16)
    yield plain("self_attn.q_b_proj", FP8)
    yield plain("self_attn.kv_a_proj_with_mqa", FP8)
    yield plain("self_attn.kv_a_layernorm", BF16)
    yield plain("self_attn.kv_b_proj", FP8)
    yield plain("self_attn.o_proj", FP8)
    if layer < config.first_k_dense_replace:
        yield from (plain(f"mlp.{matrix}", FP8) for matrix in ("gate_proj", "up_proj", "down_proj"))
    else:
        yield plain("mlp.gate", BF16)
        bias = f"layers.{layer}.mlp.gate.e_score_correction_bias"
        yield Entry(name=f"model.{bias}", dtype=F32, key=f"layers.{layer}.mlp.e_score_correction_bias")
        yield from (plain(f"mlp.shared_experts.{matrix}", FP8) for matrix in ("gate_proj", "up_proj", "down_proj"))
        for expert in range(config.n_routed_experts):
            yield from _expert(layer, expert, config.moe_intermediate_size)
    yield plain("input_layernorm", BF16)
    yield plain("post_attention_layernorm", BF16)


def _expert(layer: int, expert: int, width: int) -> Iterator[Entry]:
    """The three matrices of one routed expert, which the network keeps stacked and transposed."""
    name, key = f"model.layers.{layer}.mlp.experts.{expert}", f"layers.{layer}.mlp.experts"
    gate_up, down = f"{key}_gate_up", f"{key}_down"
    yield Entry(name=f"{name}.gate_proj.weight", dtype=FP8, key=gate_up, part=lambda p: p[expert, :, :width].T)
    yield Entry(name=f"{name}.up_proj.weight", dtype=FP8, key=gate_up, part=lambda p: p[expert, :, width:].T)
    yield Entry(name=f"{name}.down_proj.weight", dtype=FP8, key=down, part=lambda p: p[expert].T)
