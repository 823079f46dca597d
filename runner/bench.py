"""Measures a model with forced tokens: the first token from a cold start, then decoding, each beside its floor.

Tokens are forced because text from random weights repeats itself, and so do its experts. The floor of a step is the
bytes that it missed at the disk's rate, and those that nothing can overlap at the memory's, both measured in the same
run. This file must not print.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manifests import urls
from manifests.console import counted, format_bytes, format_rate, format_seconds
from manifests.errors import ManifestError, SourceNotFoundError, ToolkitError
from runner import floors, kernels, machine
from runner.cache import LatentCache
from runner.loaded import LoadedModel
from runner.sizes import routed_experts
from runner.telemetry import Usage

MAX_IDS_BYTES = 64 << 20
"""Largest file of ids that is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Some passes through the model.

    Attributes:
        tokens: Tokens that were read.
        seconds: For all of them.
        median_s: Of one pass.
        usage: What was read for them, and what for want of which they waited.
        floor_s: What the bytes take at the rates of memory and disk; None where these are not known.
    """

    tokens: int
    seconds: float
    median_s: float
    usage: Usage
    floor_s: float | None

    @property
    def share(self) -> float | None:
        """Of the floor that was reached; 1 is as fast as can be."""
        return None if self.floor_s is None else self.floor_s / self.seconds

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        asked = self.usage.expert_hits + self.usage.expert_misses
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "median_pass_s": self.median_s,
            "read_bytes": self.usage.read_bytes,
            "expert_hits": self.usage.expert_hits,
            "expert_misses": self.usage.expert_misses,
            "hit_rate": self.usage.expert_hits / asked if asked else None,
            "wait_s": self.usage.wait_s,
            "fetched_bytes": self.usage.fetched_bytes,
            "fetch_wait_s": self.usage.fetch_wait_s,
            "compute_s": self.seconds - self.usage.wait_s,
            "floor_s": self.floor_s,
            "share_of_floor": self.share,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything that was measured.

    Attributes:
        open_s: Seconds to open the checkpoint.
        first: From the first byte to the first token: the prompt, with nothing in memory but what was pinned.
        warm_up: The forced tokens for the first time.
        decode: The same again, one at a time.
        fixed_bytes: Bytes of every pass that are no routed expert.
        memory_read_gbps, disk_read_gbps: Median of those before and after; None where they cannot be known.
        peak_bytes: Most memory of the process, mapped files included.
        settings: How it ran.
    """

    open_s: float
    first: Phase
    warm_up: Phase
    decode: Phase
    fixed_bytes: int
    memory_read_gbps: float | None
    disk_read_gbps: float | None
    peak_bytes: int
    settings: dict[str, Any]

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        phases = {"first": self.first, "warm_up": self.warm_up, "decode": self.decode}
        return {
            "settings": self.settings,
            "open_s": self.open_s,
            **{name: phase.to_document() for name, phase in phases.items()},
            "fixed_bytes": self.fixed_bytes,
            "memory_read_gbps": self.memory_read_gbps,
            "disk_read_gbps": self.disk_read_gbps,
            "peak_bytes": self.peak_bytes,
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"open       {format_seconds(self.open_s)}"
        yield f"memory     {_rate(self.memory_read_gbps)} read alone; the process took {format_bytes(self.peak_bytes)}"
        yield f"disk       {_rate(self.disk_read_gbps)} read alone, past the page cache"
        for name, phase in (("first", self.first), ("decode", self.decode)):
            usage, what = phase.usage, f"{counted(phase.tokens, 'token')} in {format_seconds(phase.seconds)}"
            speed = format_rate(phase.tokens / phase.seconds, "tokens")
            share = "" if phase.share is None else f", {phase.share:.2f} of the floor"
            yield f"{name:<10} {what}, {speed}{share}"
            yield f"           {usage}"


def run(
    path: str | None,
    *,
    prompt_tokens: int,
    tokens: int,
    ids: Sequence[int] | None,
    open_model: Callable[[], LoadedModel],
    say: Callable[[str], None],
) -> Result:
    """Measure.

    Args:
        path: For the result's settings.
        prompt_tokens: Ids that make the prompt.
        tokens: Ids that follow it one by one.
        ids: All of them, so many at least; chosen at random, but always the same, when None.
        open_model: Opens it.
        say: Told what is measured now.

    Raises:
        ToolkitError: An id is outside the vocabulary; or what the model raises.
    """
    begin = time.perf_counter()
    loaded = open_model()
    open_s = time.perf_counter() - begin
    config, store = loaded.model.config, loaded.weights
    ids = _check_ids(ids, prompt_tokens, tokens, config.vocab_size)
    experts = routed_experts(config)
    say("the disk's rate")
    store.forget_cached(experts)
    disk = [floors.disk_read_gbps(loaded.contents, experts)]
    store.forget_cached(experts)
    cache = LatentCache(config, loaded.ctx)

    def step(some: Sequence[int]) -> None:
        loaded.model.logits(loaded.model.hidden(torch.tensor(some), cache)[-1:])

    def phase(parts: Sequence[Sequence[int]]) -> tuple[list[float], Usage]:
        before, seconds = store.usage, []
        for some in parts:
            begin = time.perf_counter()
            step(some)
            seconds.append(time.perf_counter() - begin)
        return seconds, store.usage.since(before)

    size = loaded.budget.pass_tokens
    prompt = ids[:prompt_tokens]
    say(f"the first token, behind {prompt_tokens} of the prompt")
    first = phase([prompt[at : at + size] for at in range(0, prompt_tokens, size)])
    forced = [[one] for one in ids[prompt_tokens : prompt_tokens + tokens]]
    length = cache.length
    memory = [floors.memory_read_gbps(store.dense_tensors())]
    say(f"{tokens} tokens, to warm up")
    warm_up = phase(forced)
    say("the same again")
    cache.truncate(length)
    decode = phase(forced)
    memory.append(floors.memory_read_gbps(store.dense_tensors()))
    disk.append(floors.disk_read_gbps(loaded.contents, experts))
    memory_gbps, disk_gbps = _middle(memory), _middle(disk)
    fixed = sum(tensor.nbytes for tensor in store.dense_tensors())

    def finish(found: tuple[list[float], Usage], *, cold: bool) -> Phase:
        seconds, usage = found
        floor = None
        if memory_gbps and disk_gbps:
            floor = usage.read_bytes / disk_gbps / 1e9
            if not cold:
                # Experts that are there are computed while others arrive; when none has to, they count themselves.
                moved = fixed * len(seconds)
                if not usage.expert_misses:
                    moved += usage.expert_hits * loaded.budget.expert
                floor += moved / memory_gbps / 1e9
        tokens = prompt_tokens if cold else len(seconds)
        return Phase(
            tokens=tokens, seconds=sum(seconds), median_s=statistics.median(seconds), usage=usage, floor_s=floor
        )

    compiled = kernels.active()
    return Result(
        open_s=open_s,
        first=finish(first, cold=True),
        warm_up=finish(warm_up, cold=False),
        decode=finish(decode, cold=False),
        fixed_bytes=fixed,
        memory_read_gbps=memory_gbps,
        disk_read_gbps=disk_gbps,
        peak_bytes=machine.peak_bytes(),
        settings={
            "model": None if path is None else urls.shown_place(path),
            "io": loaded.io,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "kernels": None if compiled is None else compiled.variant,
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
            **loaded.budget.to_document(),
        },
    )


def _check_ids(ids: Sequence[int] | None, prompt_tokens: int, tokens: int, vocab_size: int) -> Sequence[int]:
    if ids is None:
        return random.Random(0).choices(range(vocab_size), k=prompt_tokens + tokens)
    outside = [one for one in ids if one >= vocab_size]
    if outside:
        raise ToolkitError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")
    return ids


def read_ids(path: Path) -> list[int]:
    """Ids from a JSON list.

    Raises:
        ManifestError: The file is not one.
        SourceNotFoundError: There is none.
        ToolkitError: It cannot be read.
    """
    try:
        if path.stat().st_size > MAX_IDS_BYTES:
            raise ManifestError(f"{path}: larger than {format_bytes(MAX_IDS_BYTES)}; this is no list of token ids")
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise ToolkitError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not a JSON list of token ids: {error}") from error
    if not isinstance(found, list) or not all(type(one) is int and 0 <= one < 2**31 for one in found):
        raise ManifestError(f"{path}: not a JSON list of token ids")
    return found


def _middle(found: Sequence[float | None]) -> float | None:
    known = [one for one in found if one is not None]
    return statistics.median(known) if known else None


def _rate(gbps: float | None) -> str:
    return "unknown" if gbps is None else f"{gbps:.3g} GB/s"
