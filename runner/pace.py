"""Decides how many tokens to guess, from what passes with and without guesses took.

Whether guessing pays cannot be known beforehand, so it is tried, and a trial may lose time. A ledger bounds it: what
guesses have lost in all, against steps without, may not exceed a small share of the run's time. One guess a pass is
tried first, beside plain steps and in turns with them; one more only when that pays. Numbers only: this file must not
know tokens, tensors or files.
"""

from __future__ import annotations

from math import hypot
from typing import Any, Literal

from manifests.console import format_bytes
from runner.timings import Timings

Mode = Literal["auto", "on"]

ALLOWED_LOSS = 0.015
"""Share of a run's time that guesses may lose."""

LEAST_STEPS = 256
"""Steps of the shortest run that this share is taken of."""

_BASELINE = 24
"""Steps without guesses before the first trial: all that follows is measured against them."""

_DOUBTS = 2
"""The ledger takes a step to be faster than it seems by this many standard errors."""

_TRIAL = 3
"""Passes of a trial before anything is believed."""

_LONGEST_TRIAL = 32
"""Passes after which a trial that has shown no gain has failed."""

_SETTLE = 16
"""Tokens between a trial that paid and the next, with one guess more."""

_REST = 64
"""Tokens between a trial that failed and the next; twice as many behind that."""

_PLAIN_EVERY = 24
"""While guessing, one pass in so many is a step without, to see what that takes now."""


class Pace:
    """The decision, and the figures behind it.

    Args:
        mode: ``on`` always guesses; ``auto`` while it pays.
        most: Most guesses of one pass.

    Attributes:
        is_always: Whether guesses are made whatever they cost.
        planned: Guesses that the next pass should have.
        places: By place of a guess in its pass, how many were made behind right ones, and how many of them were right.
    """

    def __init__(self, mode: Mode, most: int) -> None:
        self.is_always = mode == "on"
        self.planned = most if self.is_always else 0
        self.places = ([0] * most, [0] * most)
        self._most = most
        self._of = [Timings(guesses) for guesses in range(most + 1)]
        self._steps = self._of[0]
        self._level = 0  # guesses of a pass that are known to pay
        self._last = 0  # guesses of the last pass
        self._shown = 0  # guesses of the last pass that had any
        self._seconds = 0.0
        self._lost = 0.0
        self._since_step = 0
        self._resting = 0
        self._rest = _REST
        self._all_passes = self._all_guesses = self._all_right = 0

    def record(self, seconds: float, *, guesses: int, right: int, read_bytes: int, is_usual: bool) -> None:
        """Note one pass, and decide about the next.

        Args:
            seconds: It took, guessing included.
            guesses: It checked.
            right: Of these.
            read_bytes: From the disk.
            is_usual: False for one that also read a prompt, or caught up with one.
        """
        if guesses:
            self._all_passes += 1
            self._all_guesses += guesses
            self._all_right += right
            self._shown = guesses
            for place in range(min(guesses, right + 1)):
                self.places[0][place] += 1
                self.places[1][place] += place < right
            if self._steps:
                # No credit: what was gained against steps that were slower once must not be lost against fast ones.
                self._lost = max(0.0, self._lost + seconds - (1 + right) * self._least_step_s)
        if guesses or is_usual:
            self._seconds += seconds
        if is_usual:
            self._of[guesses].add(seconds, 1 + right, read_bytes)
        self._last = guesses
        self._since_step = self._since_step + 1 if guesses else 0
        if not guesses and self._steps.forget_if_faster():
            self._level, self._resting = 0, 1
        if 0 < self._resting <= 1 + right:
            for kind in self._of[self._level + 1 :]:
                kind.clear()
        self._resting = max(0, self._resting - 1 - right)
        if not self.is_always:
            self.planned = self._plan()

    @property
    def acceptance(self) -> float | None:
        """Share of all guesses that were right; None before the first."""
        return self._all_right / self._all_guesses if self._all_guesses else None

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        passes = self._passes
        return {
            "passes": self._all_passes,
            "guesses": self._all_guesses,
            "guesses_per_pass": self._shown or None,
            "acceptance": self.acceptance,
            "acceptance_by_place": [
                right / tried if tried else None for tried, right in zip(*self.places, strict=True)
            ],
            "tokens_per_pass": passes.tokens if passes else None,
            "pass_s": passes.seconds if passes else None,
            "step_s": self._steps.seconds if self._steps else None,
            "pass_read_bytes": passes.read_bytes if passes else None,
            "step_read_bytes": self._steps.read_bytes,
            "speedup": passes.rate / self._steps.rate if passes and self._steps else None,
        }

    def __str__(self) -> str:
        """One line for people: what was found, and what came of it."""
        passes, steps = self._passes, self._steps
        if not self._all_passes:
            return "no guesses were made: the text is too short to try"
        count = f"{self._all_passes:,} pass{'es' if self._all_passes > 1 else ''}"
        found = f"{count} with guesses, {self.acceptance:.0%} of them right"
        if not (steps and passes):
            return found + (self._outcome if steps else "")
        kind = f"a pass with {self._shown}" if self._most > 1 else "a pass"
        cost = f"{kind} took {passes.seconds / steps.seconds:.2f} steps and gave {passes.tokens:.2f} tokens"
        read = ""
        if step_bytes := steps.read_bytes:
            more = (passes.read_bytes or 0) / step_bytes
            read = f", read {more:.2f} times the {format_bytes(round(step_bytes))} of a step"
        return f"{found}; {cost}{read}: {passes.rate / steps.rate:.2f} times as fast{self._outcome}"

    @property
    def _outcome(self) -> str:
        if self.is_always:
            return ""
        if self._level:
            return f"; stays with {self._level}" if self._level < self._shown else "; kept on"
        return "; left off" if self._rest > _REST else "; not decided yet"

    @property
    def _passes(self) -> Timings | None:
        """Those with guesses that there is most to say of; None when there is nothing."""
        return self._of[self._shown] if self._shown and self._of[self._shown] else None

    @property
    def _least_step_s(self) -> float:
        """What a step takes at least, as far as steps have shown."""
        return self._steps.seconds * max(0.0, 1 - _DOUBTS * self._steps.seconds_doubt(self._steps.noise))

    def _plan(self) -> int:
        """Guesses of the next pass."""
        if len(self._steps) < _BASELINE or self._since_step >= _PLAIN_EVERY:
            return 0
        if self._level and self._no_longer_pays():
            self._level -= 1
            self._fail()
        more = self._level + 1
        if more > self._most or self._resting or not self._tries(more):
            return self._level
        # In turns: whatever else the machine does then slows both.
        return self._level if self._last == more else more

    def _no_longer_pays(self) -> bool:
        level = self._level
        return self._of[level].rate <= self._of[level - 1].rate or not self._can_afford(level)

    def _tries(self, more: int) -> bool:
        """Whether a trial with one guess more goes on; what it shows, when it does not, is drawn from it."""
        passes = self._of[more]
        if len(passes) >= _TRIAL:
            gain, doubt = self._gain(more, self._level)
            if gain > 1 + doubt:
                self._level, self._resting, self._rest = more, _SETTLE, _REST
                return False
            if gain < 1 - doubt or len(passes) >= _LONGEST_TRIAL:
                self._fail()
                return False
        if not self._can_afford(more):
            self._fail()
            return False
        return True

    def _fail(self) -> None:
        self._resting, self._rest = self._rest, 2 * self._rest

    def _gain(self, guesses: int, instead: int) -> tuple[float, float]:
        """How many times as fast so many guesses are, and the standard error of that."""
        noise = self._steps.noise
        one, other = self._of[guesses], self._of[instead]
        doubts = (one.seconds_doubt(noise), one.tokens_doubt, other.seconds_doubt(noise), other.tokens_doubt)
        return one.rate / other.rate, hypot(*doubts)

    def _can_afford(self, guesses: int) -> bool:
        """Whether the ledger has room for one more pass with so many guesses."""
        step_s = self._steps.seconds
        if passes := self._of[guesses]:
            loss = passes.seconds - passes.tokens * self._least_step_s
        else:
            fewer = self._of[guesses - 1]
            # One guess may be as dear as a step, and the next as the one before it; all may be wrong.
            each = step_s if guesses == 1 else (fewer.seconds - step_s) / (guesses - 1)
            loss = guesses * each
        return self._lost + loss <= ALLOWED_LOSS * max(self._seconds, LEAST_STEPS * step_s)
