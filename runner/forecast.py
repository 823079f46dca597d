"""What a model will do on this machine, from its sizes and the machine's rates: before anyone waits for it.

Arithmetic only; the rates are measured by `runner.floors`. A forecast is what the bytes take: no run is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from manifests.console import format_bytes
from runner.budget import Budget, Sizes
from runner.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What was measured, in GB/s; None where it could not be.

    Attributes:
        memory: Reading memory.
        direct: Reading experts past the page cache.
        mapped: Mapping experts that are not in it.
    """

    memory: float | None
    direct: float | None
    mapped: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One model on this machine.

    Attributes:
        budget: How its memory would be used.
        rates: What was measured.
        fixed_bytes: Bytes of every token that are no routed expert.
        routed_bytes: Bytes of the routed experts of one token.
        all_bytes: Memory that would hold everything.
        hit_rate: Share of experts that are in memory when routing has no favourites.
        warm_s: A token with everything in memory.
        expected_s: A token with this budget, at that hit rate.
        cold_s: The first token: all of it from the disk.
        io: The faster way in here.
        advice: What would help most.
    """

    budget: Budget
    rates: Rates
    fixed_bytes: int
    routed_bytes: int
    all_bytes: int
    hit_rate: float
    warm_s: float | None
    expected_s: float | None
    cold_s: float | None
    io: str
    advice: str

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        return {
            "budget": self.budget.to_document(),
            "memory_read_gbps": self.rates.memory,
            "disk_read_gbps": self.rates.direct,
            "disk_mapped_gbps": self.rates.mapped,
            "fixed_bytes": self.fixed_bytes,
            "routed_bytes": self.routed_bytes,
            "all_bytes": self.all_bytes,
            "hit_rate": self.hit_rate,
            "tokens_per_s_warm": _per_s(self.warm_s),
            "tokens_per_s_expected": _per_s(self.expected_s),
            "first_token_s": self.cold_s,
            "io": self.io,
            "advice": self.advice,
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        budget = self.budget
        ram = "all it wants" if budget.ram is None else format_bytes(budget.ram)
        yield (
            f"budget     {ram}: dense weights {format_bytes(budget.dense)}, {budget.slots} experts "
            f"{format_bytes(budget.slots * budget.slot)}, a context of {budget.ctx} tokens, "
            f"passes of {budget.pass_tokens}"
        )
        yield (
            f"rates      memory {_gbps(self.rates.memory)}, disk {_gbps(self.rates.direct)} direct, "
            f"{_gbps(self.rates.mapped)} mapped: --io {self.io}"
        )
        yield (
            f"a token    {format_bytes(self.fixed_bytes)} of dense weights and {format_bytes(self.routed_bytes)} of "
            f"experts, {self.hit_rate:.0%} of them in memory"
        )
        if self.expected_s is not None and self.warm_s is not None and self.cold_s is not None:
            yield (
                f"at best    {1 / self.expected_s:.3g} tokens/s, {1 / self.warm_s:.3g} with everything in memory; "
                f"{self.cold_s:.3g} s to the first token"
            )
        yield f"advice     {self.advice}"


def forecast(
    config: ModelConfig, sizes: Sizes, *, fixed_bytes: int, stored_bytes: int, budget: Budget, rates: Rates
) -> Forecast:
    """Foretell.

    Args:
        config: The model.
        sizes: Its checkpoint's.
        fixed_bytes: Bytes of every token that are no routed expert.
        stored_bytes: What the disk has of them.
        budget: How the memory is divided.
        rates: The machine's.
    """
    layers = max(0, config.num_hidden_layers - config.first_k_dense_replace)
    routed = min(config.num_experts_per_tok, config.n_routed_experts) * layers * sizes.expert
    hit_rate = min(1.0, budget.slots / sizes.experts) if sizes.experts else 1.0
    direct, mapped = rates.direct or 0.0, rates.mapped or 0.0
    # Mapped experts are in the page cache for the next run too, so that way wins when it costs little; where it has no
    # rate, as on a server, there is none.
    io = "direct" if direct > 1.15 * mapped or not mapped else "mmap"
    disk = max(direct, mapped)
    warm = expected = cold = None
    missed_s = 0.0
    if rates.memory and disk:
        warm = (fixed_bytes + routed) / rates.memory / 1e9
        missed_s = (1 - hit_rate) * routed / disk / 1e9
        expected = warm if hit_rate == 1.0 else missed_s + fixed_bytes / rates.memory / 1e9
        cold = (stored_bytes + routed) / disk / 1e9
    return Forecast(
        budget=budget,
        rates=rates,
        fixed_bytes=fixed_bytes,
        routed_bytes=routed,
        all_bytes=budget.fixed + sizes.experts * sizes.slot,
        hit_rate=hit_rate,
        warm_s=warm,
        expected_s=expected,
        cold_s=cold,
        io=io,
        advice=_advice(budget, sizes, hit_rate, expected, missed_s),
    )


def _advice(budget: Budget, sizes: Sizes, hit_rate: float, expected_s: float | None, missed_s: float) -> str:
    everything = budget.fixed + sizes.experts * sizes.slot
    if hit_rate == 1.0:
        return "everything fits in memory: faster memory, or more cores up to its rate, would help"
    if expected_s is None or missed_s > expected_s / 2:
        return (
            f"the disk is what a token waits for: more memory (all experts need {format_bytes(everything)}), "
            "then a faster disk"
        )
    return f"memory is read longer than the disk: faster memory, then more of it ({format_bytes(everything)} for all)"


def _per_s(seconds: float | None) -> float | None:
    return 1 / seconds if seconds else None


def _gbps(rate: float | None) -> str:
    return "unknown" if rate is None else f"{rate:.3g} GB/s"
