"""Replay routing traces against policies and sizes of memory: how many uses would have found their expert in memory?

A layer asks for all its experts at once. Those that are in memory are used first; each of the others takes the place
of a victim, which is no expert of the same pass and layer as long as that fits. What is counted is what a run with
that much memory would do, but that experts read ahead of time are not. The optimum knows the future: no policy can
beat it.

Numbers only: this file must not know files, tensors or the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from typing import Any

from manifests.errors import ManifestError, ToolkitError
from runner.policy import HALF_LIFE, Key, Policy
from runner.trace import Trace

HALF_LIVES = (2.0, 4.0, 8.0, 16.0, 64.0)
SHARES = (16, 8, 4, 2)
"""Default windows: one such part of all experts."""

OPTIMUM = "optimum"


@dataclass(slots=True)
class Tally:
    """Uses of experts, and how many of them found theirs in memory."""

    uses: int = 0
    hits: int = 0

    @property
    def hit_rate(self) -> float | None:
        """None when nothing was used."""
        return self.hits / self.uses if self.uses else None

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        return {"uses": self.uses, "hits": self.hits, "hit_rate": self.hit_rate}


@dataclass(frozen=True, slots=True)
class Tallies:
    """Passes of one token apart from those of several, which are prompts."""

    decode: Tally
    prefill: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What policies would have done.

    Attributes:
        experts: In the whole model.
        decode_passes: Passes of one token.
        prefill_passes: Passes of several.
        windows: By the number of experts in memory and the name of the policy.
    """

    experts: int
    decode_passes: int
    prefill_passes: int
    windows: Mapping[int, Mapping[str, Tallies]]

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        return {
            "experts": self.experts,
            "decode_passes": self.decode_passes,
            "prefill_passes": self.prefill_passes,
            "half_life": HALF_LIFE,
            "windows": [
                {
                    "experts_in_memory": window,
                    "policies": {
                        name: {"decode": one.decode.to_document(), "prefill": one.prefill.to_document()}
                        for name, one in policies.items()
                    },
                }
                for window, policies in self.windows.items()
            ],
        }


def replay(
    traces: Sequence[Trace], windows: Sequence[int] | None = None, *, on_run: Callable[[], object] = lambda: None
) -> Replay:
    """Run all policies over traces, one after the other as one program would: what is in memory stays there.

    Args:
        traces: At least one, all of the same model.
        windows: Numbers of experts in memory; some shares of all experts when not given.
        on_run: Called after each policy and window, for progress.

    Raises:
        ManifestError: The traces are of different models.
        ToolkitError: There is no trace, or a window holds no expert.
    """
    if not traces:
        raise ToolkitError("there is no trace to replay")
    experts = _experts(traces)
    chosen = dict.fromkeys(windows if windows is not None else default_windows(experts))
    if any(window < 1 for window in chosen):
        raise ToolkitError("a window of no expert cannot run anything; give one of at least 1")
    passes = [one for trace in traces for one in trace.passes]
    steps = [
        (one.tokens, [[(layer, expert) for expert in ids] for layer, ids in one.experts.items()]) for one in passes
    ]
    found: dict[int, dict[str, Tallies]] = {}
    for window in chosen:
        found[window] = {}
        for name, keeper in _keepers(steps):
            found[window][name] = simulate(steps, keeper, window)
            on_run()
    decode = sum(one.tokens == 1 for one in passes)
    return Replay(experts=experts, decode_passes=decode, prefill_passes=len(passes) - decode, windows=found)


def default_windows(experts: int) -> list[int]:
    """Some shares of all experts."""
    return [max(1, experts // share) for share in SHARES]


def policy_names() -> list[str]:
    """The columns of a replay: half lives of 0, of infinity, and between."""
    return ["lru", "lfu", *(f"lrfu {half_life:g}" for half_life in HALF_LIVES), OPTIMUM]


Steps = Sequence[tuple[int, Sequence[Sequence[Key]]]]
"""Passes: their tokens, and the keys of each layer."""


def simulate(steps: Steps, keeper: Keeper, window: int) -> Tallies:
    """Count what one policy would find in memory.

    Args:
        steps: Passes in order.
        keeper: The policy, with nothing in memory.
        window: Experts that fit.
    """
    tallies = Tallies(Tally(), Tally())
    for tokens, layers in steps:
        tally = tallies.decode if tokens == 1 else tallies.prefill
        keeper.tick()
        for keys in layers:
            misses = [key for key in keys if key not in keeper]
            tally.uses += len(keys)
            tally.hits += len(keys) - len(misses)
            for key in keys:
                keeper.touch(key)
            keeper.lock(keys)
            # A layer that is larger than the window goes through it one by one: what was used may leave at once.
            fits = len(keys) <= window
            if not fits:
                keeper.unlock(key for key in keys if key in keeper)
            for key in misses:
                if len(keeper) == window:
                    victim = keeper.victim()
                    assert victim is not None
                    keeper.forget(victim)
                keeper.admit(key)
                if not fits:
                    keeper.unlock([key])
            if fits:
                keeper.unlock(keys)
    return tallies


class Optimum:
    """Keeps what is needed soonest again, which only a replay can know. The interface of `Policy`.

    Args:
        steps: All passes that will come.

    Source: Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5 (1966).
    """

    def __init__(self, steps: Steps) -> None:
        self._future: dict[Key, list[int]] = {}
        for number, keys in enumerate(keys for _, layers in steps for keys in layers):
            for key in keys:
                self._future.setdefault(key, []).append(number)
        for uses in self._future.values():
            uses.reverse()
        self._resident: set[Key] = set()
        self._heap: list[tuple[float, Key]] = []

    def __contains__(self, key: Key) -> bool:
        """Whether it is in memory."""
        return key in self._resident

    def __len__(self) -> int:
        """How many are in memory."""
        return len(self._resident)

    def tick(self) -> None:
        """Passes do not matter."""

    def touch(self, key: Key) -> None:
        """The next use of this key is now: look at the one behind it."""
        self._future[key].pop()

    def admit(self, key: Key) -> None:
        """It is in memory."""
        self._resident.add(key)

    def forget(self, key: Key) -> None:
        """It is no longer in memory."""
        self._resident.remove(key)

    def lock(self, keys: Iterable[Key]) -> None:
        """Every locked key was touched before, so its entries are from before its last use until it is unlocked."""

    def unlock(self, keys: Iterable[Key]) -> None:
        """Enter each with its next use."""
        for key in keys:
            heappush(self._heap, (-self._next(key), key))

    def victim(self) -> Key | None:
        """Give the key that will not be used for longest."""
        # An entry from before the key's last use is not the first: all other keys are used later than that.
        while self._heap:
            if (key := self._heap[0][1]) in self._resident:
                return key
            heappop(self._heap)
        return None

    def _next(self, key: Key) -> float:
        uses = self._future[key]
        return uses[-1] if uses else inf


Keeper = Policy | Optimum


def _keepers(steps: Steps) -> list[tuple[str, Keeper]]:
    keepers: list[Keeper] = [Policy(half_life) for half_life in (0, inf, *HALF_LIVES)]
    return list(zip(policy_names(), [*keepers, Optimum(steps)], strict=True))


def _experts(traces: Sequence[Trace]) -> int:
    """Routed experts of the model that all traces are of.

    Raises:
        ManifestError: They are of different models.
    """
    kinds = {(one.model_type, one.layers, one.experts, one.experts_per_token) for one in traces}
    if len(kinds) > 1:
        raise ManifestError("the traces are of different models; replay those of one model at a time")
    ((_, layers, experts, _),) = kinds
    return len(layers) * experts
