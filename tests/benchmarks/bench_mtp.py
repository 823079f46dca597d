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
from typing import Any

import torch
from report import finish, say

from manifests.console import parse_size
from runner import floors
from runner.breakeven import Machine, pass_s, speedup, step_s
from runner.cache import LatentCache
from runner.drafter import Drafter
from runner.loaded import LoadedModel, mtp_costs, routed_experts
from runner.sampling import SamplingParams, sample

ACCEPTANCES = (0.0, 0.6, 0.8, 0.9, 1.0)
GREEDY = SamplingParams()


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

    def plain(self) -> float:
        """Seconds of a token, one at a time."""
        cache, model = self._started(None), self.loaded.model
        begin = time.perf_counter()
        for at in range(16, 16 + self.tokens):
            sample(model.logits(model.hidden(torch.tensor(self.ids[at : at + 1]), cache))[0], GREEDY, at)
        return (time.perf_counter() - begin) / self.tokens

    def guessed(self, acceptance: float, seed: int) -> tuple[float, float]:
        """Seconds of a token, and tokens of a pass."""
        drafter = Drafter(self.mtp, self.loaded.ctx)
        cache, model, chance = self._started(drafter), self.loaded.model, random.Random(seed)
        at, passes = 16, 0
        begin = time.perf_counter()
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
        return (time.perf_counter() - begin) / (at - 16), (at - 16) / passes

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
    disk = floors.disk_read_gbps(loaded.contents, experts) or 1.0
    result: dict[str, Any] = {"budget": loaded.budget.to_document(), "disk_read_gbps": disk, "ways": []}
    times: dict[float, list[tuple[float, float, float, float]]] = {acceptance: [] for acceptance in ACCEPTANCES}
    costs = mtp_costs(loaded.contents, config, loaded.mtp)
    for number in range(options.rounds):
        for acceptance in ACCEPTANCES:
            before = runs.loaded.weights.usage
            plain = runs.plain()
            usage = loaded.weights.usage.since(before)
            guessed, tokens = runs.guessed(acceptance, number)
            again = runs.plain()
            hits = usage.expert_hits / (usage.expert_hits + usage.expert_misses)
            times[acceptance].append(((plain + again) / 2 / guessed, tokens, hits, (plain + again) / 2))
    memory = floors.memory_read_gbps(loaded.weights.dense_tensors()) or 1.0
    for acceptance, found in times.items():
        measured, tokens, hits, plain = (statistics.median(column) for column in zip(*found, strict=True))
        machine = Machine(memory=memory, disk=disk, hits=1.0 if hits > 0.999 else hits)
        predicted = speedup(costs, machine, acceptance=tokens - 1)
        # Steps are slower than their floor; what is predicted is a ratio.
        ratio = pass_s(costs, machine, guesses=1, tokens=tokens) / step_s(costs, machine)
        say(
            f"acceptance {acceptance} forced, {tokens:.2f} tokens a pass: {measured:.3f} times as fast, "
            f"predicted {predicted:.3f} ({measured / predicted - 1:+.1%}); a pass {tokens / measured:.2f} steps, "
            f"predicted {ratio:.2f}; a step {plain * 1e3:.0f} ms, {hits:.0%} hits"
        )
        result["ways"].append(
            {"forced": acceptance, "tokens_per_pass": tokens, "speedup": measured, "predicted": predicted, "hits": hits}
        )
    result["memory_read_gbps"] = memory
    result["distinct_experts_of_two"] = statistics.fmean(one for one in runs.seen if one > config.num_experts_per_tok)
    finish("speculation with forced acceptance", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
