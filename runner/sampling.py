"""From logits to one token id. It knows numbers and positions, not what came before or what an id spells.

Randomness is one uniform number per (seed, position), from a hash and not from a generator that remembers:
the token at a position does not depend on how many were drawn before it, in which process, or how.

Shapes: V vocabulary.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from manifests.errors import ToolkitError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose a token. The filters apply in the order in which they stand here.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        top_p: Keep the fewest most likely tokens whose share of what top_k left reaches this; 1 keeps all.
        min_p: Keep tokens at least this many times as likely as the most likely one; 0 keeps all.
        seed: Any integer; the same one gives the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ToolkitError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise ToolkitError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ToolkitError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ToolkitError(f"min_p must be between 0 and 1, not {self.min_p}")


def sample(logits_V: Tensor, params: SamplingParams, position: int) -> int:
    """Choose the token for a position.

    Args:
        logits_V: [V] float32; -inf forbids a token.
        params: How.
        position: Of the token to come, counted from the start of the text.

    Returns:
        Its id. Equal logits go to the lowest id, at temperature 0 and wherever a filter cuts.

    Raises:
        ToolkitError: The logits hold NaN or +inf, or forbid every token.
    """
    logits_V = logits_V.double()
    top = float(logits_V.max())
    if not math.isfinite(top):
        raise ToolkitError(f"the logits at position {position} are not finite; the weights are damaged")
    if params.temperature == 0:
        return int((logits_V == top).nonzero()[0])
    # The maximum goes first: a tiny temperature then sends the rest to exp(-inf) = 0, and never to inf - inf.
    weight_V = ((logits_V - top) / params.temperature).exp()
    kept = _filter(weight_V, params)
    # In order of id, not of weight: a rounding error that swaps two neighbours in rank changes nothing here.
    total = weight_V[kept].cumsum(0)
    target = uniform(params.seed, position) * total[-1]
    # The first id whose running total exceeds the target. There is one: the total is at least 1, and times any
    # number below 1 it comes out smaller even when rounded.
    return int(kept[torch.searchsorted(total, target, right=True)])


def uniform(seed: int, position: int) -> float:
    """Give the number in [0, 1) that belongs to a seed and a position: 53 bits of a sha256."""
    digest = hashlib.sha256(f"{seed}/{position}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def _filter(weight_V: Tensor, params: SamplingParams) -> Tensor:
    """Give the ids that stay, ascending; ``weight_V`` is [V] float64, proportional to probability."""
    order = weight_V.sort(descending=True, stable=True)
    weight, ids = order.values, order.indices
    if params.top_k:
        weight, ids = weight[: params.top_k], ids[: params.top_k]
    stays = weight > 0
    if params.top_p < 1:
        before = weight.cumsum(0) - weight
        stays &= before < params.top_p * weight.sum()
    if params.min_p > 0:
        stays &= weight >= params.min_p * weight[0]
    return ids[stays].sort().values
