"""Decides whether guessing pays, from what passes with and without guesses took.

That cannot be known beforehand, so guessing is tried, and a trial may lose time. A ledger bounds it: what guesses have
lost in all, against steps without, may not exceed a small share of the run's time. Numbers only: this file must not
know tokens, tensors or files.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from manifests.console import format_bytes

Mode = Literal["auto", "on"]

ALLOWED_LOSS = 0.015
"""Share of a run's time that guesses may lose."""

LEAST_STEPS = 256
"""Steps of the shortest run that this share is taken of."""

_BASELINE = 6
"""Steps without guesses before the first trial."""

_TRIAL = 4
"""Passes of a trial before anything is believed."""

_DOUBT = 16
"""Passes of a trial after which bad luck is no longer supposed."""

_REST = 64
"""Steps without guesses behind a trial that failed; twice as many behind the next."""

_PLAIN_EVERY = 24
"""While guessing, one pass in so many is a step without, to see what that takes now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    seconds: float
    tokens: int
    read_bytes: int


class Pace:
    """The decision, and the figures behind it.

    Args:
        mode: ``on`` always guesses; ``auto`` while it pays.
        guesses: Most guesses of one pass.

    Attributes:
        is_always: Whether guesses are made whatever they cost.
        places: By place of a guess in its pass, how many were made behind right ones, and how many of them were right.
    """

    def __init__(self, mode: Mode, guesses: int) -> None:
        self.is_always = mode == "on"
        self._most = guesses
        self._steps: deque[_Pass] = deque(maxlen=8)
        self._passes: deque[_Pass] = deque(maxlen=32)
        self._seconds = 0.0
        self._lost = 0.0
        self._since_step = 0
        self._resting = 0
        self._rest = _REST
        self._all_passes = self._all_guesses = self._all_right = 0
        self.places = ([0] * guesses, [0] * guesses)

    def wants_guesses(self) -> bool:
        """Whether the next pass should have guesses."""
        if self.is_always:
            return True
        if len(self._steps) < _BASELINE or self._resting > 0 or self._lost >= self._allowance:
            return False
        if len(self._passes) < _TRIAL:
            return True
        speedup = self._speedup(0.0)
        if speedup > 1:
            return self._since_step < _PLAIN_EVERY
        count = len(self._passes)
        if count < _DOUBT and self._speedup(0.5 * self._most / count**0.5) > 1:
            return True
        self._resting, self._rest = self._rest, 2 * self._rest
        return False

    def record(self, seconds: float, *, guesses: int, right: int, read_bytes: int, is_usual: bool) -> None:
        """Note one pass.

        Args:
            seconds: It took, guessing included.
            guesses: It checked.
            right: Of these.
            read_bytes: From the disk.
            is_usual: False for one that also read a prompt, or caught up with one.
        """
        if guesses == 0:
            self._resting -= 1
            self._since_step = 0
            if self._resting == 0:
                self._passes.clear()
            if is_usual:
                self._seconds += seconds
                self._steps.append(_Pass(seconds=seconds, tokens=1, read_bytes=read_bytes))
            return
        self._all_passes += 1
        self._all_guesses += guesses
        self._all_right += right
        for place in range(min(guesses, right + 1)):
            self.places[0][place] += 1
            self.places[1][place] += place < right
        self._since_step += 1
        self._seconds += seconds
        if self._steps:
            self._lost += seconds - (1 + right) * self._step_s
        if is_usual:
            self._passes.append(_Pass(seconds=seconds, tokens=1 + right, read_bytes=read_bytes))

    @property
    def acceptance(self) -> float | None:
        """Share of all guesses that were right; None before the first."""
        return self._all_right / self._all_guesses if self._all_guesses else None

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        known = bool(self._steps and self._passes)
        return {
            "passes": self._all_passes,
            "guesses": self._all_guesses,
            "acceptance": self.acceptance,
            "acceptance_by_place": [
                right / tried if tried else None for tried, right in zip(*self.places, strict=True)
            ],
            "tokens_per_pass": self._tokens if self._passes else None,
            "pass_s": self._pass_s if self._passes else None,
            "step_s": self._step_s if self._steps else None,
            "pass_read_bytes": _mean_bytes(self._passes),
            "step_read_bytes": _mean_bytes(self._steps),
            "speedup": self._speedup(0.0) if known else None,
        }

    def __str__(self) -> str:
        """One line for people: what was found, and what came of it."""
        if not self._all_passes:
            return "no guesses were made: the text is too short to try"
        passes = f"{self._all_passes:,} pass{'es' if self._all_passes > 1 else ''}"
        found = f"{passes} with guesses, {self.acceptance:.0%} of them right"
        if self._steps and not self._passes:
            return f"{found}; left off: it cost too much to try again"
        if not (self._steps and self._passes):
            return found
        speedup = self._speedup(0.0)
        cost = f"a pass took {self._pass_s / self._step_s:.2f} steps and gave {self._tokens:.2f} tokens"
        read = ""
        if step_bytes := _mean_bytes(self._steps):
            more = (_mean_bytes(self._passes) or 0) / step_bytes
            read = f", read {more:.2f} times the {format_bytes(round(step_bytes))} of a step"
        decided = "" if self.is_always else "; kept on" if speedup > 1 else "; left off"
        return f"{found}; {cost}{read}: {speedup:.2f} times as fast{decided}"

    @property
    def _allowance(self) -> float:
        return ALLOWED_LOSS * max(self._seconds, LEAST_STEPS * self._step_s)

    @property
    def _step_s(self) -> float:
        return statistics.median(one.seconds for one in self._steps)

    @property
    def _pass_s(self) -> float:
        return statistics.median(one.seconds for one in self._passes)

    @property
    def _tokens(self) -> float:
        return statistics.fmean(one.tokens for one in self._passes)

    def _speedup(self, luck: float) -> float:
        """Tokens a second with guesses against those without, were each pass to give so many tokens more."""
        return self._step_s * (self._tokens + luck) / self._pass_s


def _mean_bytes(passes: deque[_Pass]) -> float | None:
    return statistics.fmean(one.read_bytes for one in passes) if passes else None
