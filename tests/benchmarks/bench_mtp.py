"""Speculation with forced acceptance beside plain steps, and beside what counting bytes predicts.

    python tests/benchmarks/bench_mtp.py MODEL [--ram SIZE] [--io mmap|direct] [--tokens N] [--rounds N]

The model has random weights, so its guesses are as good as none. Here guesses are made and checked in full, and only
whether they count is decided by a random number: the acceptance is FORCED. Ids are forced too, because random weights
repeat themselves. Ways are taken in turns, and each is compared with the plain steps of its own round.

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from report import finish, say

from manifests.console import parse_size
from runner import floors
from runner.breakeven import Costs
from runner.cache import LatentCache
from runner.drafter import Drafter
from runner.loaded import LoadedModel
from runner.sampling import SamplingParams, sample
from runner.sizes import mtp_costs, routed_experts

ACCEPTANCES = (0.6, 0.8, 0.9)
GREEDY = SamplingParams()


class Round(NamedTuple):
    """One comparison: seconds of a plain step, how many times as fast, tokens of a pass, bytes of experts read by each.

    And what counting bytes predicts, at the rates that memory and disk had beside it.
    """

    step_s: float
    speedup: float
    tokens: float
    step_read: float
    pass_read: float
    memory_gbps: float
    disk_gbps: float
    predicted: float


class Runs:
    """One text, run with and without guesses."""

    def __init__(self, loaded: LoadedModel, tokens: int) -> None:
        assert loaded.mtp_module is not None
        self.loaded = loaded
        self.mtp = loaded.mtp_module
        self.tokens = tokens
        chance = random.Random(0)
        self.ids = chance.choices(range(loaded.model.config.vocab_size), k=tokens + 20)
        self.seen: list[int] = []
        loaded.model.observer = lambda _layer, ids: self.seen.append(len(ids.unique()))

    def plain(self) -> tuple[float, float]:
        """Seconds of a token, one at a time, and bytes read for it."""
        cache, model = self._started(None), self.loaded.model
        begin, read = time.perf_counter(), self.loaded.weights.read_bytes
        for at in range(16, 16 + self.tokens):
            sample(model.logits(model.hidden(torch.tensor(self.ids[at : at + 1]), cache))[0], GREEDY, at)
        seconds, read = time.perf_counter() - begin, self.loaded.weights.read_bytes - read
        return seconds / self.tokens, read / self.tokens

    def guessed(self, acceptance: float, seed: int) -> tuple[float, float, float]:
        """Seconds of a token, bytes read for a pass, and tokens of a pass."""
        drafter = Drafter(self.mtp, self.loaded.ctx)
        cache, model, chance = self._started(drafter), self.loaded.model, random.Random(seed)
        at, passes = 16, 0
        begin, read = time.perf_counter(), self.loaded.weights.read_bytes
        while at < 16 + self.tokens:
            drafter.propose(self.ids[: at + 1], 1, GREEDY)
            right = chance.random() < acceptance
            guess = self.ids[at + 1] if right else chance.randrange(model.config.vocab_size)
            stream = model.stream(torch.tensor([self.ids[at], guess]), cache)
            normed = model.norm(stream)
            drafter.observe(at, stream, normed)
            for row, logits in enumerate(model.logits(normed)):
                sample(logits, GREEDY, at + row)
            at += 1 + right
            cache.truncate(at)
            drafter.rewind(at)
            passes += 1
        seconds, read = time.perf_counter() - begin, self.loaded.weights.read_bytes - read
        return seconds / (at - 16), read / passes, (at - 16) / passes

    def _started(self, drafter: Drafter | None) -> LatentCache:
        cache, model = LatentCache(self.loaded.model.config, self.loaded.ctx), self.loaded.model
        stream = model.stream(torch.tensor(self.ids[:16]), cache)
        if drafter is not None:
            drafter.observe(0, stream, model.norm(stream))
            drafter.enter(self.ids[:17])
            # The last one waits, as it does for a token that was just chosen.
            drafter.rewind(15)
            stream = model.stream(torch.tensor(self.ids[15:16]), self._at(cache, 15))
            drafter.observe(15, stream, model.norm(stream))
        return cache

    def _at(self, cache: LatentCache, length: int) -> LatentCache:
        cache.truncate(length)
        return cache


def predict(costs: Costs, memory: float, disk: float, *, tokens: float, step_read: float, pass_read: float) -> float:
    """Steps that a pass should take: by the bytes that it needs, and by those of experts that were read for it."""

    def seconds(fixed: float, routed: float, read: float) -> float:
        # Experts that are there are computed while others arrive, so the longer of the two counts.
        return fixed / memory + max(routed * costs.expert / memory, read / disk)

    fixed = costs.fixed + costs.mtp_fixed + costs.head
    routed = costs.layers * costs.distinct(2) + costs.distinct(tokens)
    return seconds(fixed, routed, pass_read) / seconds(costs.fixed, costs.layers * costs.top, step_read)


def main() -> int:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ram", type=parse_size)
    parser.add_argument("--io", choices=("mmap", "direct"), default="direct")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    loaded = LoadedModel(options.model, ram=options.ram, io=options.io, ctx=options.tokens + 32, speculate="on")
    runs, config = Runs(loaded, options.tokens), loaded.model.config
    experts = routed_experts(config, has_mtp=True)
    say("to warm up")
    runs.plain()
    runs.guessed(1.0, 0)
    result: dict[str, Any] = {"budget": loaded.budget.to_document(), "ways": []}
    times: dict[float, list[Round]] = {acceptance: [] for acceptance in ACCEPTANCES}
    costs = mtp_costs(loaded.contents, config, loaded.mtp)

    def rates() -> tuple[float, float]:
        memory = floors.memory_read_gbps(loaded.weights.dense_tensors())
        return memory or 1.0, floors.disk_read_gbps(loaded.contents, experts) or 1.0

    for number in range(options.rounds):
        for acceptance in ACCEPTANCES:
            memory, disk = rates()
            plain, step_read = runs.plain()
            guessed, pass_read, tokens = runs.guessed(acceptance, number)
            again, read_again = runs.plain()
            plain, step_read = (plain + again) / 2, (step_read + read_again) / 2
            memory, disk = (statistics.fmean(pair) for pair in zip((memory, disk), rates(), strict=True))
            taken = predict(costs, memory * 1e9, disk * 1e9, tokens=tokens, step_read=step_read, pass_read=pass_read)
            times[acceptance].append(
                Round(
                    step_s=plain,
                    speedup=plain / guessed,
                    tokens=tokens,
                    step_read=step_read,
                    pass_read=pass_read,
                    memory_gbps=memory,
                    disk_gbps=disk,
                    predicted=tokens / taken,
                )
            )
    for acceptance, found in times.items():
        middle = Round(*(statistics.median(column) for column in zip(*found, strict=True)))
        errors = [one.speedup / one.predicted - 1 for one in found]
        say(
            f"acceptance {acceptance} forced, {middle.tokens:.2f} tokens a pass: {middle.speedup:.3f} times as fast, "
            f"predicted {middle.predicted:.3f} ({statistics.median(errors):+.1%}, "
            f"{min(errors):+.1%} to {max(errors):+.1%}); a step {middle.step_s * 1e3:.0f} ms; "
            f"read {middle.step_read / 1e6:.0f} MB for a step, {middle.pass_read / 1e6:.0f} for a pass, "
            f"at {middle.memory_gbps:.1f} and {middle.disk_gbps:.2f} GB/s"
        )
        result["ways"].append({"forced": acceptance, "error": statistics.median(errors), **middle._asdict()})
    result["distinct_experts_of_two"] = statistics.fmean(one for one in runs.seen if one > config.num_experts_per_tok)
    finish("speculation with forced acceptance", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
