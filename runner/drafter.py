"""Guesses what follows a text with the MTP layer. It must not know the engine, nor whether guessing pays.

Shapes: T entries or positions, D hidden.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from runner.mtp import MtpModule
from runner.sampling import SamplingParams, sample

Takes = Literal["normed", "stream"]


class Drafter:
    """Guesses what follows a text, of which it is told the hidden states.

    Entry i of the MTP layer's cache is made of hidden state i and token i + 1, so a position waits until the token
    behind it is known. Positions of which nothing was told, at the beginning of a text, have no entry: guesses are
    worse then.

    Args:
        mtp: The layer.
        ctx: The most positions a text may have.
        takes: Which hidden states it is given and gives itself: behind the final norm, or before it.

    Attributes:
        length: Positions of the text whose hidden states are known.
    """

    def __init__(self, mtp: MtpModule, ctx: int, *, takes: Takes = "normed") -> None:
        self.length = 0
        self._mtp = mtp
        self._takes = takes
        self._cache = mtp.new_cache(ctx)
        self._first = 0  # position of the cache's first entry
        self._rows: list[Tensor] = []  # hidden states of the last positions, in order

    @property
    def waiting(self) -> int:
        """Positions that have no entry yet."""
        return self.length - self._entered

    @property
    def _entered(self) -> int:
        return self._first + self._cache.length

    def observe(self, position: int, stream: Tensor, normed: Tensor) -> None:
        """Take the main model's hidden states of T positions, from ``position`` on; both [T, D] float32."""
        if position != self.length:
            self._begin_at(position)
        self._rows.append(normed if self._takes == "normed" else stream)
        self.length += len(normed)

    def rewind(self, length: int) -> int:
        """Forget all positions from ``length`` on.

        Returns:
            From which position on hidden states are needed: ``length``, or one less when that one was used up for a
            token that may be another now.
        """
        if length > self.length or (length == self.length and self.waiting):
            return length
        first_row = self.length - sum(map(len, self._rows))
        entered = min(self._entered, length - 1)
        if entered < self._first:
            self._begin_at(length)
            return length
        self._cache.truncate(entered - self._first)
        if first_row > entered:
            self.length, self._rows = length - 1, []
            return length - 1
        self._rows = [torch.cat(self._rows)[: length - first_row]]
        self.length = length
        return length

    def enter(self, ids: Sequence[int]) -> Tensor:
        """Make the entries that the known tokens allow.

        Args:
            ids: The whole text, as far as it is known.

        Returns:
            [T, D] float32, what the layer made of the new entries, before its norm.
        """
        begin, end = self._entered, min(self.length, len(ids) - 1)
        if end <= begin:
            return torch.empty(0, 0)
        rows = torch.cat(self._rows)
        first_row = self.length - len(rows)
        stream = self._mtp.stream(
            rows[begin - first_row : end - first_row], torch.tensor(ids[begin + 1 : end + 1]), self._cache
        )
        self._rows = [rows[end - first_row :].clone()]  # a view would keep the whole
        return stream

    def propose(self, ids: Sequence[int], count: int, sampling: SamplingParams) -> list[int]:
        """Guess the next tokens of a text.

        Args:
            ids: All of it, one token longer than what is known of its hidden states.
            count: The most guesses.
            sampling: How the model chooses; guesses are chosen likewise, with the same random numbers.

        Returns:
            The guesses; none when there is nothing new to make them of.
        """
        if count < 1 or len(ids) != self.length + 1:
            return []
        stream = self.enter(ids)[-1:]
        if not len(stream):
            return []
        entered, guesses = self._cache.length, list[int]()
        try:
            while True:
                normed = self._mtp.norm(stream)
                guesses.append(sample(self._mtp.logits(normed)[0], sampling, len(ids) + len(guesses)))
                if len(guesses) == count or self._cache.length == self._cache.ctx:
                    return guesses
                hidden = normed if self._takes == "normed" else stream
                stream = self._mtp.stream(hidden, torch.tensor(guesses[-1:]), self._cache)
        finally:
            self._cache.truncate(entered)  # what was made of guesses

    def drop(self, keep: int) -> None:
        """Forget all but the last positions that wait, and every entry, so that no more is left to be caught up."""
        rows = torch.cat(self._rows)[-keep:].clone()
        self._begin_at(self.length - len(rows))
        self._rows, self.length = [rows], self.length + len(rows)

    def _begin_at(self, position: int) -> None:
        self._cache.truncate(0)
        self._first = self.length = position
        self._rows = []
