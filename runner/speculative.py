"""Speculative decoding: tokens are guessed, the model checks all of them in one pass, what is right is kept.

A guess is right when it is the very token that the model chooses there. Choices depend on logits, seed and position
alone, so the text is the same with and without guesses, greedy or sampled, and so is its distribution.

Shapes: T positions, D hidden, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from runner.drafter import Drafter
from runner.pace import Pace
from runner.sampling import SamplingParams, sample

KEPT_POSITIONS = 8
"""That wait for a trial. To catch up with a whole prompt could cost more than guesses will ever give: on the embedded
model 32 took as long as 4 to 14 steps, 8 two or three. Guesses are nearly as good: 0.683 of them are right behind 8,
0.699 behind 32, 0.705 behind 256, and there is one more with each token."""

_MOST_WAITING = 64
"""Positions that are kept before all but the last are dropped: seldom, because each time takes a copy."""


class Speculation:
    """Guesses for an engine, and a record of what they cost and gave.

    Args:
        drafter: Makes them.
        tokens: Most guesses of one pass.
        pace: Says when to guess.
        read_bytes: Counts what was read from the disk so far.
        clock: Seconds.

    Attributes:
        pace: As given.
    """

    def __init__(
        self,
        drafter: Drafter,
        tokens: int,
        pace: Pace,
        *,
        read_bytes: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pace = pace
        self._drafter = drafter
        self._tokens = tokens
        self._read_bytes = read_bytes
        self._clock = clock
        self._guesses = self._right = self._ran = 0
        self._caught_up = False

    def observe(self, position: int, ids: Sequence[int], stream: Tensor, normed: Tensor) -> None:
        """Take the hidden states of positions from ``position`` on, both [T, D] float32.

        Args:
            position: The first of them.
            ids: The text up to the last of them.
            stream: Before the final norm.
            normed: Behind it.
        """
        self._ran += len(normed)
        self._drafter.observe(position, stream, normed)
        if len(normed) > self._tokens + 1 and self.pace.is_always:
            self._drafter.enter(ids)
        elif self._drafter.waiting > _MOST_WAITING:
            self._drafter.drop(keep=KEPT_POSITIONS)

    def rewind(self, length: int) -> int:
        """See `Drafter.rewind`."""
        return self._drafter.rewind(length)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one pass of the engine, with what comes before and behind it."""
        self._guesses = self._right = self._ran = 0
        self._caught_up = False
        begin, read = self._clock(), self._read_bytes()
        yield
        seconds, read = self._clock() - begin, self._read_bytes() - read
        is_usual = self._ran == 1 + self._guesses and not self._caught_up
        self.pace.record(seconds, guesses=self._guesses, right=self._right, read_bytes=read, is_usual=is_usual)

    def propose(self, ids: Sequence[int], most: int, sampling: SamplingParams) -> list[int]:
        """Guess what follows a text, if it is time to; see `Drafter.propose`."""
        count = min(most, self._tokens, self.pace.planned)
        if count < 1:
            return []
        # In turns with plain steps there is one more to enter than behind a pass that had guesses.
        self._caught_up = self._drafter.waiting > 2 + self._tokens
        if self._drafter.waiting > KEPT_POSITIONS and not self.pace.is_always:
            self._drafter.drop(keep=KEPT_POSITIONS)
        guesses = self._drafter.propose(ids, count, sampling)
        self._guesses = len(guesses)
        return guesses

    def settle(self, right: int) -> None:
        """Note how many of the guesses were right."""
        self._right = right


def accept(logits: Tensor, guesses: Sequence[int], sampling: SamplingParams, position: int) -> list[int]:
    """The model's own tokens, as far as the guesses were right, and one more.

    Args:
        logits: [1 + guesses, V] float32, behind the last known token and each guess.
        guesses: What the model was given.
        sampling: How to choose.
        position: Of the first of them.

    Returns:
        One token or more.
    """
    chosen: list[int] = []
    for row, guess in zip(logits, [*guesses, None], strict=True):
        chosen.append(sample(row, sampling, position + len(chosen)))
        if chosen[-1] != guess:
            break
    return chosen
