"""Guessing while it pays, and never at the price of more than a small share of the run."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from runner.pace import Pace


@dataclass(frozen=True, kw_only=True)
class World:
    """What passes take, in steps: a step is 1."""

    cost: float
    acceptance: float
    noise: float = 0.0
    tokens: int = 1
    catch_up: float = 0.0


def run(world: World, length: int, *, seed: int = 0, pace: Pace | None = None) -> tuple[float, Pace]:
    """Seconds for so many tokens, without the noise that the pace sees; and the pace."""
    chance = random.Random(seed)
    pace = pace or Pace("auto", world.tokens)
    seconds, made, caught_up = 0.0, 0, False
    while made < length:
        guesses = world.tokens if pace.wants_guesses() else 0
        right = 0
        while right < guesses and chance.random() < world.acceptance:
            right += 1
        taken = world.cost if guesses else 1.0
        usual = not guesses or caught_up or not world.catch_up
        if not usual:
            taken, caught_up = taken + world.catch_up, True
        seen = taken * max(0.2, chance.gauss(1, world.noise))
        pace.record(seen, guesses=guesses, right=right, read_bytes=150 if guesses else 100, is_usual=usual)
        seconds, made = seconds + taken, made + 1 + right
    return seconds, pace


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("cost", [1.05, 1.4, 1.8, 2.5])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("length", [256, 1000, 5000])
def test_it_never_loses_more_than_three_parts_of_a_hundred(
    acceptance: float, cost: float, noise: float, length: int, seed: int
) -> None:
    world = World(cost=cost, acceptance=acceptance, noise=noise)
    seconds, _ = run(world, length, seed=seed)
    # A pass at the end may give more tokens than are counted.
    assert seconds <= 1.03 * length + cost


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("cost", "acceptance"), [(1.05, 0.6), (1.3, 0.65), (1.3, 0.85), (1.6, 0.95)])
def test_it_takes_most_of_what_there_is_to_gain(cost: float, acceptance: float, seed: int) -> None:
    seconds, pace = run(World(cost=cost, acceptance=acceptance, noise=0.1), 1000, seed=seed)
    always = 1000 * cost / (1 + acceptance)
    assert seconds < always + 0.15 * (1000 - always) + 20
    assert "kept on" in str(pace)


def test_several_guesses_a_pass() -> None:
    good, _ = run(World(cost=1.6, acceptance=0.8, tokens=3), 1000)
    bad, _ = run(World(cost=2.6, acceptance=0.4, tokens=3), 1000)
    assert good < 700
    assert bad < 1030


def test_a_trial_that_costs_a_long_catch_up_is_not_repeated() -> None:
    seconds, pace = run(World(cost=1.0, acceptance=0.0, catch_up=30.0), 1000)
    assert seconds < 1000 + 30 + 5
    assert pace.to_document()["passes"] == 1


def test_what_no_longer_pays_is_left_and_what_begins_to_pay_is_found() -> None:
    _, pace = run(World(cost=1.3, acceptance=0.9), 400)
    seconds, _ = run(World(cost=1.3, acceptance=0.05), 400, pace=pace)
    assert seconds < 1.06 * 400
    assert not pace.wants_guesses()
    seconds, _ = run(World(cost=1.2, acceptance=0.9), 4000, pace=pace)
    assert seconds < 0.8 * 4000


def test_a_step_that_becomes_faster_is_noticed() -> None:
    """As when experts have come into memory: what paid beside slow steps need not pay beside fast ones."""
    pace = Pace("auto", 1)
    for _ in range(10):
        pace.record(4.0, guesses=0, right=0, read_bytes=0, is_usual=True)
    seconds, _ = run(World(cost=2.2, acceptance=1.0), 2000, pace=pace)
    assert seconds < 1.06 * 2000


def test_on_is_on_whatever_it_costs() -> None:
    pace = Pace("on", 1)
    seconds, _ = run(World(cost=3.0, acceptance=0.0), 100, pace=pace)
    assert seconds == pytest.approx(300)
    assert str(pace) == "100 passes with guesses, 0% of them right"


def test_nothing_is_tried_before_steps_are_known() -> None:
    pace = Pace("auto", 1)
    pace.record(50.0, guesses=0, right=0, read_bytes=0, is_usual=False)  # a prompt
    for _ in range(6):
        assert not pace.wants_guesses()
        pace.record(1.0, guesses=0, right=0, read_bytes=0, is_usual=True)
    assert pace.wants_guesses()
    assert str(pace) == "no guesses were made: the text is too short to try"
    assert pace.to_document()["step_s"] == 1.0


def test_it_says_what_it_found() -> None:
    pace = Pace("auto", 1)
    for _ in range(8):
        pace.record(2.0, guesses=0, right=0, read_bytes=1_000_000, is_usual=True)
    for right in (1, 1, 0, 1):
        pace.record(3.0, guesses=1, right=right, read_bytes=1_500_000, is_usual=True)
    assert str(pace) == (
        "4 passes with guesses, 75% of them right; a pass took 1.50 steps and gave 1.75 tokens, read 1.50 times the "
        "1.00 MB of a step: 1.17 times as fast; kept on"
    )
    document = pace.to_document()
    assert document["speedup"] == pytest.approx(2 * 1.75 / 3)
    assert (document["passes"], document["guesses"], document["acceptance"]) == (4, 4, 0.75)
    assert (document["pass_read_bytes"], document["step_read_bytes"]) == (1_500_000, 1_000_000)
