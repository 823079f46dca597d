"""What speculation can gain, by counting bytes: a pass that checks guesses against the steps that it replaces.

Weights are read once a pass, however many tokens it has, and routed experts once for each that any of its tokens needs.
So a pass with guesses reads more experts, the MTP layer with its own, and the head once more for each guess; and gives
one token and those guessed right. Numbers only: this file must not know tensors or files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Bytes of a model with an MTP layer.

    Attributes:
        fixed: Read by every step of the main model: all that is no routed expert, head included.
        layers: MoE layers of the main model.
        experts: Routed experts of a layer.
        top: Of these, chosen for a token.
        expert: One of them.
        mtp_fixed: The MTP layer but for its experts, without the head.
        head: Read for each guess.
    """

    fixed: int
    layers: int
    experts: int
    top: int
    expert: int
    mtp_fixed: int
    head: int

    def distinct(self, rows: float) -> float:
        """Experts of a layer that so many tokens need together, when each chooses by itself."""
        return self.experts * (1 - (1 - self.top / self.experts) ** rows) if self.experts else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the bytes come from.

    Attributes:
        memory: GB/s of reading memory.
        disk: GB/s of reading experts.
        hits: Share of experts that are in memory.
    """

    memory: float
    disk: float
    hits: float

    def seconds(self, fixed: float, routed: float) -> float:
        """Experts that are there are computed while others arrive, so the longer of the two counts."""
        return (fixed / self.memory + max((1 - self.hits) * routed / self.disk, routed / self.memory)) / 1e9


Distinct = Callable[[float], float]


def step_s(costs: Costs, machine: Machine) -> float:
    """Seconds of a step without guesses."""
    return machine.seconds(costs.fixed, costs.layers * costs.top * costs.expert)


def pass_s(costs: Costs, machine: Machine, *, guesses: int, tokens: float, distinct: Distinct | None = None) -> float:
    """Seconds of a pass with guesses, guessing included.

    Args:
        costs: The model.
        machine: Where it runs.
        guesses: Of the pass.
        tokens: That a pass gives; the MTP layer makes an entry for each.
        distinct: Experts of a layer that so many tokens need; as if each chose by itself when not given.
    """
    count = distinct or costs.distinct
    fixed = costs.fixed + guesses * (costs.mtp_fixed + costs.head)
    routed = costs.layers * count(1 + guesses) + count(tokens) + (guesses - 1) * costs.top
    return machine.seconds(fixed, routed * costs.expert)


def tokens_per_pass(acceptance: float, guesses: int) -> float:
    """Tokens that a pass gives when each guess behind a right one is right with this probability."""
    return sum(acceptance**right for right in range(guesses + 1))


def speedup(
    costs: Costs, machine: Machine, *, acceptance: float, guesses: int = 1, distinct: Distinct | None = None
) -> float:
    """Tokens a second with guesses against those without."""
    return gain(costs, machine, tokens=tokens_per_pass(acceptance, guesses), guesses=guesses, distinct=distinct)


def gain(costs: Costs, machine: Machine, *, tokens: float, guesses: int, distinct: Distinct | None = None) -> float:
    """The same, by the tokens that a pass gives."""
    seconds = pass_s(costs, machine, guesses=guesses, tokens=tokens, distinct=distinct)
    return tokens * step_s(costs, machine) / seconds


def break_even(costs: Costs, machine: Machine, *, guesses: int = 1, distinct: Distinct | None = None) -> float | None:
    """The least acceptance that pays; None when not even guesses that are always right do."""
    if speedup(costs, machine, acceptance=1.0, guesses=guesses, distinct=distinct) <= 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if speedup(costs, machine, acceptance=middle, guesses=guesses, distinct=distinct) > 1:
            high = middle
        else:
            low = middle
    return high


def to_document(
    costs: Costs, machine: Machine, *, guesses: int = 1, distinct: Distinct | None = None
) -> dict[str, Any]:
    """What is known without running it, for ``--json``; the keys are a promise."""
    return {
        "guesses": guesses,
        "hits": machine.hits,
        "step_s": step_s(costs, machine),
        "pass_s": pass_s(costs, machine, guesses=guesses, tokens=1.0 + guesses, distinct=distinct),
        "break_even_acceptance": break_even(costs, machine, guesses=guesses, distinct=distinct),
        "best_speedup": speedup(costs, machine, acceptance=1.0, guesses=guesses, distinct=distinct),
    }
