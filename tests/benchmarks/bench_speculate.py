"""Tokens a second with --speculate off, auto and on, in turns, on the same texts.

    python tests/benchmarks/bench_speculate.py [MODEL] [--ram SIZE] [--io mmap|direct] [--tokens N] [--prompts N]
                                               [--rounds N] [--draft-tokens K] [--temp T] [--threads N]

Without MODEL the embedded one continues Python that it was not trained on. A model without tokenizer gets random ids.
Every text is made anew in each way, by an engine and a pace of its own, over weights that are held once; all ways must
give the same text. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from itertools import islice
from typing import Any

import torch
from report import finish, say

from manifests.console import parse_size
from manifests.errors import SourceNotFoundError
from runner.demo import corpus
from runner.drafter import Drafter
from runner.engine import Engine
from runner.loaded import LoadedModel
from runner.pace import Pace
from runner.sampling import SamplingParams
from runner.speculative import Speculation

PROMPT_TOKENS = 64
WAYS = ("off", "auto", "on")


def main() -> int:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--ram", type=parse_size)
    parser.add_argument("--io", choices=("mmap", "direct"))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--draft-tokens", type=int, default=1)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = LoadedModel(
        options.model, ram=options.ram, io=options.io, ctx=PROMPT_TOKENS + options.tokens + 16, speculate="on"
    )
    prompts = read_prompts(loaded, options.prompts)
    sampling = SamplingParams(temperature=options.temp, seed=1)
    run(loaded, prompts[0], "on", options.tokens, options.draft_tokens, sampling)  # to warm up
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    paces: dict[str, dict[str, Any]] = {}
    for number, prompt in enumerate(prompts * options.rounds):
        texts = {}
        first = number % len(WAYS)  # each way comes first as often as the others
        for way in WAYS[first:] + WAYS[:first]:
            taken, texts[way], pace = run(loaded, prompt, way, options.tokens, options.draft_tokens, sampling)
            seconds[way].append(taken)
            if pace is not None:
                paces[way] = pace.to_document()
                say(f"{way}: {taken:.2f} s; {pace}")
        if not texts["off"] == texts["auto"] == texts["on"]:
            sys.exit("the texts differ")
    result: dict[str, Any] = {"tokens": options.tokens, "prompts": len(prompts), "last": paces}
    for way in WAYS:
        ratios = [off / mine for off, mine in zip(seconds["off"], seconds[way], strict=True)]
        result[way] = {
            "tokens_per_s": options.tokens / statistics.median(seconds[way]),
            "times_as_fast": statistics.median(ratios),
            "least": min(ratios),
            "all": sum(seconds["off"]) / sum(seconds[way]),
        }
        say(
            f"{way}: {result[way]['tokens_per_s']:.1f} tokens/s, {result[way]['times_as_fast']:.3f} times as fast, "
            f"{result[way]['all']:.3f} over all texts, {result[way]['least']:.3f} at least"
        )
    finish("speculation", result)
    return 0


def run(
    loaded: LoadedModel, prompt: list[int], way: str, tokens: int, guesses: int, sampling: SamplingParams
) -> tuple[float, list[int], Pace | None]:
    """Seconds behind the prompt, the text, and what was found."""
    pace = speculation = None
    if way != "off":
        assert loaded.mtp_module is not None
        pace = Pace("on" if way == "on" else "auto", guesses)
        speculation = Speculation(
            Drafter(loaded.mtp_module, loaded.ctx),
            guesses,
            pace,
            read_bytes=lambda: loaded.weights.read_bytes,
        )
    engine = Engine(loaded.model, ctx=loaded.ctx, pass_tokens=loaded.budget.pass_tokens, speculation=speculation)
    text = engine.generate(prompt, max_tokens=tokens, sampling=sampling, eos_ids=())
    found = [next(text)]
    begin = time.perf_counter()
    found += text
    return time.perf_counter() - begin, found, pace


def read_prompts(loaded: LoadedModel, count: int) -> list[list[int]]:
    """Beginnings of held-out modules, or random ids."""
    try:
        encode = loaded.text.encode
    except SourceNotFoundError:
        chance, vocab = random.Random(0), range(loaded.model.config.vocab_size)
        return [chance.choices(vocab, k=PROMPT_TOKENS) for _ in range(count)]
    texts = (ids for text in corpus.texts(held_out=True) if len(ids := encode(text)) >= 2 * PROMPT_TOKENS)
    return [ids[PROMPT_TOKENS : 2 * PROMPT_TOKENS] for ids in islice(texts, count)]


if __name__ == "__main__":
    sys.exit(main())
