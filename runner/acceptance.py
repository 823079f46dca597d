"""How often the MTP layer guesses the token that the model chooses, by place: the next but one, the one behind it, ...

Measured in two ways. Teacher-forced: at every position of a text, whatever the model would have written there. Freely:
the model continues beginnings of the text, and guesses count as in use. Greedy, both.

Shapes: T positions, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from runner.budget import HEAD_TOKENS
from runner.cache import LatentCache
from runner.drafter import Takes
from runner.engine import Engine
from runner.model import Model
from runner.mtp import MtpModule
from runner.pace import Pace
from runner.sampling import SamplingParams

GREEDY = SamplingParams()


@dataclass(slots=True)
class Counts:
    """Guesses by place: those that were made behind right ones, and those of them that were right."""

    tried: list[int]
    right: list[int]

    @classmethod
    def zeros(cls, places: int) -> Counts:
        """None yet."""
        return cls([0] * places, [0] * places)

    @property
    def rates(self) -> list[float | None]:
        """Share that was right at each place; None where nothing was tried."""
        return [right / tried if tried else None for right, tried in zip(self.right, self.tried, strict=True)]

    def tokens(self, guesses: int) -> float | None:
        """Tokens that a pass with so many guesses gives; None when too little was tried."""
        given, chance = 1.0, 1.0
        for rate in self.rates[:guesses]:
            if rate is None:
                return None
            chance *= rate
            given += chance
        return given

    def add(self, place: int, right: bool) -> None:
        """Count one guess."""
        self.tried[place] += 1
        self.right[place] += right


@dataclass(slots=True)
class Neighbours:
    """Different experts that a token and those behind it choose in a layer together: what a pass of them reads.

    Attributes:
        rows: How many tokens.
    """

    rows: int
    _sum: int = field(default=0, init=False)
    _count: int = field(default=0, init=False)

    def observe(self, _layer: int, expert_ids: Tensor) -> None:
        """Take one layer's choices for T tokens in a row, [T, K]."""
        for begin in range(len(expert_ids) - self.rows + 1):
            self._sum += len(expert_ids[begin : begin + self.rows].unique())
            self._count += 1

    @property
    def mean(self) -> float | None:
        """None when no layer had so many tokens."""
        return self._sum / self._count if self._count else None


def teacher_forced(
    model: Model, mtp: MtpModule, ids: Sequence[int], places: int, *, takes: Takes = "normed"
) -> Iterator[tuple[int, int, int]]:
    """Guess at every position of a text that fits into one pass; give each guess.

    Guesses behind the first are made of the text's own tokens too, so each place is judged by itself.

    Args:
        model: What is to be guessed.
        mtp: What guesses.
        ids: The text.
        places: Guesses in a row.
        takes: See `Drafter`.

    Yields:
        Its place, the token, and the token that the model chooses.
    """
    stream = model.stream(torch.tensor(ids), LatentCache(model.config, len(ids)))
    normed = model.norm(stream)
    chosen = [int(row.argmax()) for some in normed.split(HEAD_TOKENS) for row in model.logits(some)]
    hidden, cache = (normed if takes == "normed" else stream), mtp.new_cache(len(ids) + places)
    for position in range(len(ids) - 2):
        state = hidden[position : position + 1]
        for place in range(min(places, len(ids) - 2 - position)):
            known = position + 1 + place
            out = mtp.stream(state, torch.tensor(ids[known : known + 1]), cache)
            state = mtp.norm(out)
            yield place, int(mtp.logits(state)[0].argmax()), chosen[known]
            state = state if takes == "normed" else out
        cache.truncate(position + 1)


def continued(
    engine: Engine, pace: Pace, ids: Sequence[int], *, tokens: int, eos_ids: Sequence[int], count: Counts
) -> list[int]:
    """Continue a text with guesses, count these, and give what was written."""
    before = [list(column) for column in pace.places]
    text = list(engine.generate(ids, max_tokens=tokens, sampling=GREEDY, eos_ids=eos_ids))
    for place in range(len(count.tried)):
        count.tried[place] += pace.places[0][place] - before[0][place]
        count.right[place] += pace.places[1][place] - before[1][place]
    return text


def beginnings(ids: Sequence[int], prompt: int, most: int) -> list[Sequence[int]]:
    """So many parts of a text of ``prompt`` ids at most, spread over it; the first begins where it does."""
    count = max(1, min(most, len(ids) // prompt))
    starts = [len(ids) * number // count for number in range(count)]
    return [ids[begin : min(begin + prompt, end)] for begin, end in pairwise([*starts, len(ids)])]
