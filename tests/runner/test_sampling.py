"""One token from logits: filters, ties, and randomness that hangs on (seed, position) and on nothing else."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import pytest
import torch

from manifests.errors import ToolkitError
from runner.sampling import SamplingParams, sample, uniform

PINNED = [0.3323347519, 0.661017775143, 0.616305733594]
LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 2.0, 0.5])


def draws(params: SamplingParams, logits: torch.Tensor = LOGITS, count: int = 800) -> Counter[int]:
    return Counter(sample(logits, params, position) for position in range(count))


def test_temperature_zero_is_the_lowest_id_of_the_best() -> None:
    assert sample(LOGITS, SamplingParams(), 0) == 1
    assert sample(torch.zeros(1000), SamplingParams(), 7) == 0
    assert sample(torch.full((5,), -math.inf).index_fill(0, torch.tensor(3), 1.0), SamplingParams(), 0) == 3


def test_uniform_is_pinned() -> None:
    """Changing it would change every text of every seed."""
    digest = hashlib.sha256(b"42/7").digest()
    assert uniform(42, 7) == (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    assert [round(uniform(0, position), 12) for position in range(3)] == PINNED
    numbers = [uniform(seed, position) for seed in (-1, 0, 2**70) for position in range(2000)]
    assert 0 <= min(numbers) < max(numbers) < 1
    assert len(set(numbers)) == 6000
    assert sum(numbers) / 6000 == pytest.approx(0.5, abs=0.02)


def test_frequencies_follow_the_softmax_at_a_temperature() -> None:
    for temperature in (0.5, 1.0, 3.0):
        counts = draws(SamplingParams(temperature=temperature), count=4000)
        expected = (LOGITS.double() / temperature).softmax(0).tolist()
        for token, probability in enumerate(expected):
            assert counts[token] / 4000 == pytest.approx(probability, abs=4 * math.sqrt(probability / 4000))


def test_the_token_depends_on_seed_and_position_only() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    first = [sample(LOGITS, params, position) for position in range(50)]
    assert [sample(LOGITS, params, position) for position in reversed(range(50))] == first[::-1]
    assert [sample(LOGITS, SamplingParams(temperature=1.0, seed=4), position) for position in range(50)] != first


def test_a_small_change_of_rank_does_not_change_the_token() -> None:
    """Two nearly equal logits that swap ranks: the running total goes by id, so the same token comes out."""
    one, other = LOGITS.clone(), LOGITS.clone()
    one[1] += 1e-6
    other[4] += 1e-6
    params = SamplingParams(temperature=1.0)
    assert [sample(one, params, p) for p in range(300)] == [sample(other, params, p) for p in range(300)]


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 4}), (3, {1, 2, 4}), (99, set(range(6)))])
def test_top_k_keeps_exactly_k(top_k: int, kept: set[int]) -> None:
    assert set(draws(SamplingParams(temperature=2.0, top_k=top_k))) == kept


def test_top_k_one_cuts_ties_to_the_lowest_id() -> None:
    assert set(draws(SamplingParams(temperature=1.0, top_k=1), torch.zeros(9), 50)) == {0}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((0.4, {0}), (0.51, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert set(draws(SamplingParams(temperature=1.0, top_p=top_p), logits)) == kept, top_p
    # Of what top_k left: 0.5 and 0.3 are 0.625 and 0.375.
    assert set(draws(SamplingParams(temperature=1.0, top_k=2, top_p=0.6), logits)) == {0}


def test_min_p_is_relative_to_the_best() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for min_p, kept in ((0.0, {0, 1, 2, 3}), (0.2, {0, 1, 2}), (0.5, {0, 1}), (1.0, {0})):
        assert set(draws(SamplingParams(temperature=1.0, min_p=min_p), logits)) == kept, min_p


def test_filters_see_the_temperature() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(SamplingParams(temperature=0.3, top_p=0.8), logits)) == {0}
    assert set(draws(SamplingParams(temperature=9.0, top_p=0.8), logits)) == {0, 1, 2, 3}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert set(draws(SamplingParams(temperature=100.0), logits)) == {1, 3}
    assert set(draws(SamplingParams(temperature=100.0, top_k=4), logits)) == {1, 3}


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_both_ends_of_the_interval(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    monkeypatch.setattr("runner.sampling.uniform", lambda seed, position: number)
    logits = torch.tensor([-math.inf, 3.0, 1.0, 2.0, -math.inf])
    assert sample(logits, SamplingParams(temperature=1.0), 0) == (1 if number == 0 else 3)


def test_each_token_owns_its_lower_bound_and_not_its_upper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.sampling.uniform", lambda seed, position: 0.5)
    assert sample(torch.zeros(2), SamplingParams(temperature=1.0), 0) == 1


def test_a_tiny_temperature_is_greedy_and_not_a_crash() -> None:
    assert set(draws(SamplingParams(temperature=1e-300), torch.tensor([1.0, 3.0, 2.0]), 20)) == {1}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float) -> None:
    for params in (SamplingParams(), SamplingParams(temperature=1.0)):
        with pytest.raises(ToolkitError, match="position 9"):
            sample(torch.tensor([0.0, bad, 1.0]), params, 9)
        with pytest.raises(ToolkitError, match="position 9"):
            sample(torch.full((3,), -math.inf), params, 9)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, float]) -> None:
    with pytest.raises(ToolkitError, match=next(iter(values))):
        SamplingParams(**values)
