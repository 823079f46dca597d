"""What a network knows about a token stream: bits per byte, agreement of the MTP layer, load of the experts.

It must not change the network, nor know the optimiser or the files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runner.demo.dataset import Stream, evaluation_starts, windows
from runner.demo.network import Network
from runner.demo.parts import linear

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Teacher-forced figures over a stream.

    Attributes:
        bits_per_byte: Of the main model.
        top1: Share of tokens that the main model names first.
        mtp_agreement: Share of positions where the MTP layer names the token that the main model will name.
        mtp_top1: Share of tokens that the MTP layer names first, two ahead.
        load_min: By layer, tokens of the least used expert over the mean.
        load_max: By layer, tokens of the most used expert over the mean.
    """

    bits_per_byte: float
    top1: float
    mtp_agreement: float
    mtp_top1: float
    load_min: dict[int, float]
    load_max: dict[int, float]

    def __str__(self) -> str:
        loads = " ".join(f"{layer}:{self.load_min[layer]:.2f}-{self.load_max[layer]:.2f}" for layer in self.load_min)
        return (
            f"bits/byte {self.bits_per_byte:.4f} top1 {self.top1:.3f} "
            f"mtp {self.mtp_agreement:.3f}/{self.mtp_top1:.3f} load {loads}"
        )


@torch.no_grad()
def evaluate(network: Network, stream: Stream, length: int, max_windows: int | None = None) -> Evaluation:
    """Evaluate on windows of `length` tokens; on evenly spread ones if there are more than `max_windows`."""
    starts = evaluation_starts(stream, length)
    if max_windows is not None and len(starts) > max_windows:
        starts = starts[torch.linspace(0, len(starts) - 1, max_windows).long()]
    moe_layers = network.moe_layers()
    saved = {index: moe.load.clone() for index, moe in moe_layers.items()}
    for moe in moe_layers.values():
        moe.load.zero_()
    nats, sums = 0.0, torch.zeros(3)
    for part in torch.split(starts, max(1, _TOKENS_AT_ONCE // length)):
        ids = windows(stream, part, length)
        hidden, mtp = network(ids[:, :-1])
        logits = linear(hidden, network.lm_head).float()
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:-1].flatten(), reduction="sum").item()
        named, mtp_named = logits.argmax(-1), linear(mtp, network.lm_head).argmax(-1)
        sums += torch.stack(
            [
                (named == ids[:, 1:-1]).float().mean(),
                (mtp_named[:, :-1] == named[:, 1:]).float().mean(),
                (mtp_named == ids[:, 2:]).float().mean(),
            ]
        ) * len(part)
    load = {index: moe.load / moe.load.mean() for index, moe in moe_layers.items()}
    for index, moe in moe_layers.items():
        moe.load.copy_(saved[index])
    top1, agreement, mtp_top1 = (sums / len(starts)).tolist()
    bytes_seen = len(starts) * length * stream.text_bytes / len(stream.ids)
    return Evaluation(
        bits_per_byte=nats / math.log(2) / bytes_seen,
        top1=top1,
        mtp_agreement=agreement,
        mtp_top1=mtp_top1,
        load_min={index: value.min().item() for index, value in load.items()},
        load_max={index: value.max().item() for index, value in load.items()},
    )
