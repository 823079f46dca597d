"""What one run cost: tokens, seconds, experts, files mapped.

Numbers only: this file must not know text, tensors or the terminal.
Time is taken around the model's own work, so a slow reader of the text does not make the model look slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from manifests.console import format_bytes, format_seconds


class ExpertIds(Protocol):
    """A tensor of expert ids, [T, K] integers, as far as this file needs one."""

    def tolist(self) -> list[list[int]]:
        """One list of expert ids for each token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStats:
    """A finished run.

    Attributes:
        prompt_tokens: Tokens of the prompt, with those that the cache already held.
        prefill_tokens: Prompt tokens that were computed in this run.
        generated_tokens: New tokens.
        prefill_s: Seconds until the first new token was known.
        decode_s: Seconds for all later steps.
        decode_steps: Later steps; the last one may have found the end of the text instead of a token.
        experts_used: By layer, how many different routed experts were used.
        mapped_files: Files that are mapped, since the model was opened.
        mapped_bytes: Their bytes.
    """

    prompt_tokens: int
    prefill_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    decode_steps: int
    experts_used: dict[int, int]
    mapped_files: int
    mapped_bytes: int

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """None when nothing was computed."""
        return _rate(self.prefill_tokens, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None when no step followed the first token."""
        return _rate(self.decode_steps, self.decode_s)

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens": self.prefill_tokens,
            "generated_tokens": self.generated_tokens,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "experts_used": {str(layer): count for layer, count in sorted(self.experts_used.items())},
            "mapped_files": self.mapped_files,
            "mapped_bytes": self.mapped_bytes,
        }

    def __str__(self) -> str:
        """One line for people."""
        parts = [_phase(f"{self.prompt_tokens} prompt tokens", self.prefill_s, self.prefill_tokens_per_s)]
        reused = self.prompt_tokens - self.prefill_tokens
        if reused:
            parts[0] += f", {reused} of them kept from before"
        parts.append(_phase(f"{self.generated_tokens} generated", self.decode_s, self.decode_tokens_per_s))
        experts = sum(self.experts_used.values())
        if experts:
            parts.append(f"{experts} experts used in {len(self.experts_used)} layers")
        parts.append(f"mapped {self.mapped_files} files, {format_bytes(self.mapped_bytes)}")
        return "; ".join(parts)


class Telemetry:
    """Counters of one run, filled while it runs. Give `observe` to the model as its observer."""

    def __init__(self, prompt_tokens: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._prompt_tokens = prompt_tokens
        self._generated = 0
        self._steps: list[float] = []
        self._experts: dict[int, set[int]] = {}
        self._first_layer: int | None = None
        self._prefill_tokens = 0

    def observe(self, layer: int, expert_ids: ExpertIds) -> None:
        """Count what one MoE layer's router chose for the tokens of one pass."""
        chosen = expert_ids.tolist()
        self._experts.setdefault(layer, set()).update(*chosen)
        # Every token passes through the first MoE layer once, so its rows are the tokens that were computed.
        if self._first_layer is None:
            self._first_layer = layer
        if layer == self._first_layer and not self._steps:
            self._prefill_tokens += len(chosen)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step of the model: the first one holds the whole prefill."""
        begin = self._clock()
        try:
            yield
        finally:
            self._steps.append(self._clock() - begin)

    def count_token(self) -> None:
        """Count one new token."""
        self._generated += 1

    def stats(self, *, mapped_files: int, mapped_bytes: int) -> RunStats:
        """The run so far."""
        return RunStats(
            prompt_tokens=self._prompt_tokens,
            # A model without MoE layers never calls observe; then nothing is known to be kept from before.
            prefill_tokens=self._prompt_tokens if self._first_layer is None else self._prefill_tokens,
            generated_tokens=self._generated,
            prefill_s=sum(self._steps[:1]),
            decode_s=sum(self._steps[1:]),
            decode_steps=len(self._steps[1:]),
            experts_used={layer: len(experts) for layer, experts in self._experts.items()},
            mapped_files=mapped_files,
            mapped_bytes=mapped_bytes,
        )


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None


def _phase(what: str, seconds: float, rate: float | None) -> str:
    return f"{what} in {format_seconds(seconds)}" + (f" ({rate:.3g} tokens/s)" if rate is not None else "")
