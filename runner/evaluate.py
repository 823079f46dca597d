"""How well a model predicts a text: negative log-likelihood, perplexity, bits per byte. Ids in, numbers out.

Bits per byte can be compared between models with different tokenizers; perplexity per token cannot.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifests.console import counted
from manifests.errors import ToolkitError
from runner.budget import BLOCK_TOKENS, HEAD_TOKENS
from runner.cache import LatentCache
from runner.model import Model

_ROWS_AT_ONCE = 8
"""Rows of logits that are widened to float64 together: 8 MB for a vocabulary of 129,280. Tens of megabytes are kept by
the allocator instead of given back, several times over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a text cost the model.

    Attributes:
        tokens: Predicted tokens: all of them, without the first id of each text.
        text_bytes: Bytes of the texts in UTF-8.
        nll: Sum of -ln p over the predicted tokens, in nats.
    """

    tokens: int
    text_bytes: int
    nll: float

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood of a token."""
        mean = self.nll / self.tokens
        # A model that gives a token no chance at all has no finite perplexity.
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that a coder with this model would spend on a byte of the text."""
        return self.nll / math.log(2) / self.text_bytes

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        return {
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "nll": self.nll,
            # JSON has no infinity.
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
        }

    def __str__(self) -> str:
        return (
            f"{self.bits_per_byte:.4f} bits per byte, perplexity {self.perplexity:.3f} "
            f"({counted(self.tokens, 'token')}, {counted(self.text_bytes, 'byte')}, nll {self.nll:.2f} nats)"
        )


def evaluate(
    model: Model,
    ids: Sequence[int],
    *,
    ctx: int,
    text_bytes: int,
    on_tokens: Callable[[int], object] | None = None,
) -> Evaluation:
    """Predict every id after the first exactly once.

    The ids are read in windows of ctx that overlap by one: the last id of a window is only predicted there, and is
    what the next window starts from.

    Args:
        model: What predicts.
        ids: The whole text, with BOS in front where the model wants one.
        ctx: The most ids in a window, at least 2.
        text_bytes: Bytes of the text in UTF-8, BOS not counted.
        on_tokens: Told how many tokens were predicted since the last call.

    Raises:
        ToolkitError: There is nothing to predict, or an id is outside the vocabulary.
    """
    if len(ids) < 2 or text_bytes < 1:
        raise ToolkitError("there is nothing to predict in an empty text")
    nll = 0.0
    for begin in range(0, len(ids) - 1, ctx - 1):
        window = ids[begin : begin + ctx]
        cache = LatentCache(model.config, ctx)
        for start in range(0, len(window) - 1, BLOCK_TOKENS):
            targets = torch.tensor(window[start + 1 : start + 1 + BLOCK_TOKENS])
            hidden = model.hidden(torch.tensor(window[start : start + len(targets)]), cache)
            for some, wanted in zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
                nll += _nll(model.logits(some), wanted)
            if on_tokens is not None:
                on_tokens(len(targets))
    return Evaluation(tokens=len(ids) - 1, text_bytes=text_bytes, nll=nll)


def total(evaluations: Iterable[Evaluation]) -> Evaluation:
    """Several texts as one."""
    evaluations = list(evaluations)
    return Evaluation(
        tokens=sum(one.tokens for one in evaluations),
        text_bytes=sum(one.text_bytes for one in evaluations),
        nll=math.fsum(one.nll for one in evaluations),
    )


def _nll(logits_TV: Tensor, targets_T: Tensor) -> float:
    """Sum of -ln softmax(logits)[target], in float64: a million small terms add up without drift."""
    nll = 0.0
    for begin in range(0, len(targets_T), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        log_p = logits_TV[rows].double().log_softmax(1)
        nll -= float(log_p.gather(1, targets_T[rows].unsqueeze(1)).sum())
    return nll
