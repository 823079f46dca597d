"""What passes of one kind took and gave: figures, and how much they may be wrong by.

Numbers only: this file must not know tokens, tensors or files.
"""

from __future__ import annotations

import statistics
from collections import deque
from math import sqrt

_KEPT = 32
"""The last passes that count: enough to average noise, few enough to forget what has changed."""

_NEWEST = 5
"""The newest of them, which tell whether something has changed."""

_CHANGED = 0.05
_CHANGED_DOUBTS = 3
"""It has when these are so much faster, and by so many standard errors."""

_MEDIAN = 1.25
"""A median of so many values is as uncertain as a mean would be with this much more noise."""

_DEVIATION = 1.4826
"""The standard deviation of normal noise, in median distances from the median."""


class Timings:
    """The last passes that checked so many guesses each.

    Args:
        guesses: Of each pass; 0 is a plain step.
    """

    def __init__(self, guesses: int) -> None:
        self._guesses = guesses
        self._seconds: deque[float] = deque(maxlen=_KEPT)
        self._tokens: deque[int] = deque(maxlen=_KEPT)
        self._read_bytes: deque[int] = deque(maxlen=_KEPT)
        self._unseen = 0

    def __len__(self) -> int:
        return len(self._seconds)

    def add(self, seconds: float, tokens: int, read_bytes: int) -> None:
        """Note one pass."""
        self._seconds.append(seconds)
        self._tokens.append(tokens)
        self._read_bytes.append(read_bytes)

    def forget_if_faster(self) -> bool:
        """Forget all but the newest when these took much less, and whether that was so."""
        self._unseen += 1
        if self._unseen < _NEWEST or len(self) < 2 * _NEWEST:
            return False
        self._unseen = 0  # each value is among the newest once
        newest = list(self._seconds)[-_NEWEST:]
        faster = 1 - statistics.median(newest) / self.seconds
        if faster <= max(_CHANGED, _CHANGED_DOUBTS * _MEDIAN * self.noise / sqrt(_NEWEST)):
            return False
        for values in (self._seconds, self._tokens, self._read_bytes):
            while len(values) > _NEWEST:
                values.popleft()
        return True

    def clear(self) -> None:
        """Forget all of them."""
        self._seconds.clear()
        self._tokens.clear()
        self._read_bytes.clear()

    @property
    def seconds(self) -> float:
        """What one takes: the median, because a machine stops now and then."""
        return statistics.median(self._seconds)

    @property
    def tokens(self) -> float:
        """What one gives: the mean."""
        return statistics.fmean(self._tokens)

    @property
    def read_bytes(self) -> float | None:
        """What one reads from the disk: the mean; None without any."""
        return statistics.fmean(self._read_bytes) if self._read_bytes else None

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def noise(self) -> float:
        """The standard deviation of a pass's seconds, as a share of them."""
        middle = self.seconds
        return _DEVIATION * statistics.median(abs(one - middle) for one in self._seconds) / middle

    def seconds_doubt(self, noise: float) -> float:
        """The standard error of ``seconds``, as a share of them, where a pass's seconds have this noise."""
        return _MEDIAN * noise / sqrt(len(self))

    @property
    def tokens_doubt(self) -> float:
        """The standard error of ``tokens``, as a share of them."""
        if not self._guesses:
            return 0.0
        # As if a wholly wrong and a wholly right pass had come too: a few equal ones prove little.
        tokens = [*self._tokens, 1, 1 + self._guesses]
        return statistics.pstdev(tokens) / statistics.fmean(tokens) / sqrt(len(self))
