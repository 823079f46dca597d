"""Counting bytes: cases that can be done by hand, and DeepSeek-V3's own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.breakeven import Costs, Machine, break_even, pass_s, speedup, step_s, to_document, tokens_per_pass

SMALL = Costs(fixed=1000, layers=2, experts=8, top=2, expert=100, mtp_fixed=300, head=200)
MEMORY = Machine(memory=1e-6, disk=1e-7, hits=1.0)  # a byte takes a millisecond, and ten from the disk
DISK = replace(MEMORY, hits=0.5)
V3 = Costs(
    fixed=17_176_000_000,
    layers=58,
    experts=256,
    top=8,
    expert=44_050_944,
    mtp_fixed=440_000_000,
    head=1_853_358_080,
)


def test_a_step_reads_everything_once() -> None:
    assert step_s(SMALL, MEMORY) == pytest.approx((1000 + 2 * 2 * 100) * 1e-3)
    assert step_s(SMALL, DISK) == pytest.approx(1000e-3 + 0.5 * 400e-2)
    # So few are missed that they have arrived before the others are computed.
    assert step_s(SMALL, replace(MEMORY, hits=0.95)) == step_s(SMALL, MEMORY)


def test_a_pass_reads_what_all_its_tokens_need() -> None:
    two = 8 * (1 - 0.75**2)
    assert SMALL.distinct(1) == pytest.approx(2)
    assert SMALL.distinct(2) == pytest.approx(two)
    routed = (2 * two + 2) * 100  # two layers for both rows, the MTP layer for one entry
    expected = 1000 + 300 + 200 + routed
    assert pass_s(SMALL, MEMORY, guesses=1, tokens=1.0) == pytest.approx(expected * 1e-3)
    assert pass_s(SMALL, DISK, guesses=1, tokens=1.0) == pytest.approx(1500e-3 + 0.5 * routed * 1e-2)
    three = 8 * (1 - 0.75**3)
    # Two guesses: three rows, entries for the tokens of the pass before, and one for the second guess.
    expected = 1000 + 2 * 500 + (2 * three + two + 2) * 100
    assert pass_s(SMALL, MEMORY, guesses=2, tokens=2.0) == pytest.approx(expected * 1e-3)


def test_neighbours_that_share_experts_make_it_cheaper() -> None:
    same = pass_s(SMALL, MEMORY, guesses=1, tokens=2.0, distinct=lambda _rows: 2.0)
    assert same == pytest.approx((1500 + 3 * 200) * 1e-3)
    assert same < pass_s(SMALL, MEMORY, guesses=1, tokens=2.0)


def test_tokens_of_a_pass() -> None:
    assert tokens_per_pass(0.0, 3) == 1
    assert tokens_per_pass(1.0, 3) == 4
    assert tokens_per_pass(0.5, 2) == 1.75


@pytest.mark.parametrize("machine", [MEMORY, DISK])
@pytest.mark.parametrize("costs", [SMALL, V3, replace(SMALL, mtp_fixed=0, head=0)])
@pytest.mark.parametrize("guesses", [1, 2, 3])
def test_the_break_even_is_where_the_gain_begins(costs: Costs, machine: Machine, guesses: int) -> None:
    least = break_even(costs, machine, guesses=guesses)
    if least is None:
        assert speedup(costs, machine, acceptance=1.0, guesses=guesses) <= 1
        return
    assert speedup(costs, machine, acceptance=least, guesses=guesses) == pytest.approx(1.0, abs=1e-6)
    assert speedup(costs, machine, acceptance=min(1.0, least + 0.02), guesses=guesses) > 1


def test_what_it_says_of_the_full_model() -> None:
    """In memory it pays at half of the published acceptance; with experts on the disk not even at all of it."""
    memory = Machine(memory=40.0, disk=2.5, hits=1.0)
    found = to_document(V3, memory)
    assert 0.5 < found["break_even_acceptance"] < 0.7
    assert 1.1 < speedup(V3, memory, acceptance=0.85) < 1.3
    disk = replace(memory, hits=0.25)
    assert break_even(V3, disk) is None or break_even(V3, disk) > 0.9
    assert to_document(V3, disk)["hits"] == 0.25
