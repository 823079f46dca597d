"""What one run cost: tokens, seconds, experts, bytes read.

Numbers only: this file must not know text, tensors or the terminal.
Time is taken around the model's own work, so a slow reader of the text does not make the model look slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from manifests.console import counted, format_bytes, format_rate, format_seconds


class ExpertIds(Protocol):
    """A tensor of expert ids, [T, K] integers, as far as this file needs one."""

    def tolist(self) -> list[list[int]]:
        """One list of expert ids for each token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What was read from the disk, and what is in memory.

    Attributes:
        files: Files that were opened.
        read_bytes: Bytes that were asked of them; the system may have had some in memory.
        expert_hits: Experts that were in memory when they were asked for.
        expert_misses: Experts that were not.
        wait_s: Seconds that the model waited for weights.
        resident_bytes: Bytes of weights that are in memory now.
        fetched_bytes: Bytes that came from a server for it.
        fetch_wait_s: Seconds of `wait_s` in which some were on their way.
    """

    files: int = 0
    read_bytes: int = 0
    expert_hits: int = 0
    expert_misses: int = 0
    wait_s: float = 0.0
    resident_bytes: int = 0
    fetched_bytes: int = 0
    fetch_wait_s: float = 0.0

    def since(self, before: Usage) -> Usage:
        """What came after ``before``; what is in memory is now's."""
        return Usage(
            files=self.files - before.files,
            read_bytes=self.read_bytes - before.read_bytes,
            expert_hits=self.expert_hits - before.expert_hits,
            expert_misses=self.expert_misses - before.expert_misses,
            wait_s=self.wait_s - before.wait_s,
            resident_bytes=self.resident_bytes,
            fetched_bytes=self.fetched_bytes - before.fetched_bytes,
            fetch_wait_s=self.fetch_wait_s - before.fetch_wait_s,
        )

    def __str__(self) -> str:
        """For people."""
        asked = self.expert_hits + self.expert_misses
        hits = f", {self.expert_hits / asked:.0%} of experts were in memory" if asked else ""
        wait = f", waited {format_seconds(self.wait_s)}" if self.wait_s >= 0.05 else ""
        fetched = ""
        if self.fetched_bytes:
            fetched = (
                f", fetched {format_bytes(self.fetched_bytes)} and waited {format_seconds(self.fetch_wait_s)} for it"
            )
        read = f"read {format_bytes(self.read_bytes)}{hits}{wait}{fetched}"
        return f"{read}; {format_bytes(self.resident_bytes)} in memory"


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
        usage: What was read for it, and what is in memory since the model was opened.
    """

    prompt_tokens: int
    prefill_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    decode_steps: int
    experts_used: dict[int, int]
    usage: Usage

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """None when nothing was computed."""
        return _rate(self.prefill_tokens, self.prefill_s)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None when no step followed the first token."""
        return _rate(self.decode_steps, self.decode_s)

    @property
    def fetched_bytes_per_token(self) -> float | None:
        """Bytes from a server for each token that was read or made; None without any."""
        tokens = self.prefill_tokens + self.decode_steps
        return self.usage.fetched_bytes / tokens if tokens else None

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
            "expert_hits": self.usage.expert_hits,
            "expert_misses": self.usage.expert_misses,
            "read_bytes": self.usage.read_bytes,
            "wait_s": self.usage.wait_s,
            "resident_bytes": self.usage.resident_bytes,
            "fetched_bytes": self.usage.fetched_bytes,
            "fetched_bytes_per_token": self.fetched_bytes_per_token,
            "fetch_wait_s": self.usage.fetch_wait_s,
        }

    def __str__(self) -> str:
        """One line for people."""
        parts = [_phase(counted(self.prompt_tokens, "prompt token"), self.prefill_s, self.prefill_tokens_per_s)]
        reused = self.prompt_tokens - self.prefill_tokens
        if reused:
            parts[0] += f", {reused} of them kept from before"
        parts.append(_phase(f"{self.generated_tokens} generated", self.decode_s, self.decode_tokens_per_s))
        experts = sum(self.experts_used.values())
        if experts:
            parts.append(f"{counted(experts, 'expert')} used in {counted(len(self.experts_used), 'layer')}")
        parts.append(str(self.usage))
        if self.usage.fetched_bytes and (per_token := self.fetched_bytes_per_token) is not None:
            parts.append(f"{format_bytes(round(per_token))} fetched for each token")
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

    def stats(self, usage: Usage) -> RunStats:
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
            usage=usage,
        )


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None


def _phase(what: str, seconds: float, rate: float | None) -> str:
    return f"{what} in {format_seconds(seconds)}" + (f" ({format_rate(rate, 'tokens')})" if rate is not None else "")
