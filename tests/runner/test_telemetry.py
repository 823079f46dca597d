"""Counters of a run, with a clock of our own."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from runner.telemetry import RunStats, Telemetry, Usage


def ticks(*times: float) -> Iterator[float]:
    return iter(times)


USAGE = Usage(
    files=12, read_bytes=440_509_440, expert_hits=30, expert_misses=10, wait_s=0.25, resident_bytes=528_611_328
)


def run() -> RunStats:
    """A prompt of 5 tokens in two passes, of which 2 were kept from before; then two steps, one finds the end."""
    clock = ticks(10.0, 12.0, 20.0, 20.5, 30.0, 30.5)
    telemetry = Telemetry(5, clock=lambda: next(clock))
    with telemetry.step():
        for expert_ids in ([[1, 2], [2, 3]], [[7, 1]]):
            telemetry.observe(3, torch.tensor(expert_ids))
            telemetry.observe(4, torch.tensor(expert_ids) + 10)
    telemetry.count_token()
    with telemetry.step():
        telemetry.observe(3, torch.tensor([[0, 1]]))
        telemetry.observe(4, torch.tensor([[11, 12]]))
    telemetry.count_token()
    with telemetry.step():
        telemetry.observe(3, torch.tensor([[1, 2]]))
        telemetry.observe(4, torch.tensor([[11, 12]]))
    return telemetry.stats(USAGE)


def test_counts() -> None:
    assert run() == RunStats(
        prompt_tokens=5,
        prefill_tokens=3,
        generated_tokens=2,
        prefill_s=2.0,
        decode_s=1.0,
        decode_steps=2,
        experts_used={3: 5, 4: 4},
        usage=USAGE,
    )


def test_the_line_for_people() -> None:
    assert str(run()) == (
        "5 prompt tokens in 2.0 s (1.5 tokens/s), 2 of them kept from before; 2 generated in 1.0 s (2 tokens/s); "
        "9 experts used in 2 layers; read 441 MB, 75% of experts were in memory, waited 0.2 s; 529 MB in memory"
    )


def test_the_document() -> None:
    assert run().to_document() == {
        "prompt_tokens": 5,
        "prefill_tokens": 3,
        "generated_tokens": 2,
        "prefill_s": 2.0,
        "decode_s": 1.0,
        "prefill_tokens_per_s": 1.5,
        "decode_tokens_per_s": 2.0,
        "experts_used": {"3": 5, "4": 4},
        "expert_hits": 30,
        "expert_misses": 10,
        "read_bytes": 440_509_440,
        "wait_s": 0.25,
        "resident_bytes": 528_611_328,
        "fetched_bytes": 0,
        "fetched_bytes_per_token": 0.0,
        "fetch_wait_s": 0.0,
    }


def test_usage_of_one_run_is_what_came_since() -> None:
    before = Usage(files=10, read_bytes=9, expert_hits=5, expert_misses=4, wait_s=0.25, resident_bytes=7)
    assert USAGE.since(before) == Usage(
        files=2, read_bytes=440_509_431, expert_hits=25, expert_misses=6, wait_s=0.0, resident_bytes=528_611_328
    )


def test_nothing_done_yet_has_no_rates() -> None:
    stats = Telemetry(5).stats(Usage())
    assert (stats.prefill_tokens_per_s, stats.decode_tokens_per_s) == (None, None)
    assert str(stats) == "5 prompt tokens in 0.0 s; 0 generated in 0.0 s; read 0 B; 0 B in memory"


def test_a_model_without_experts_still_has_a_rate() -> None:
    clock = ticks(0.0, 2.0)
    telemetry = Telemetry(4, clock=lambda: next(clock))
    with telemetry.step():
        pass
    stats = telemetry.stats(Usage())
    assert (stats.prefill_tokens_per_s, stats.experts_used) == (2.0, {})


def test_an_interrupted_step_is_counted() -> None:
    clock = ticks(0.0, 2.0)
    telemetry = Telemetry(4, clock=lambda: next(clock))
    try:
        with telemetry.step():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert telemetry.stats(Usage()).prefill_s == 2.0
