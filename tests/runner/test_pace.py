"""Guessing while it pays, and never at the price of more than a small share of the run."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from runner.pace import Pace

BASELINE = 24


@dataclass(frozen=True, kw_only=True)
class World:
    """What passes take, in steps: a step is 1, a pass 1 and ``cost`` for each guess."""

    cost: float
    acceptance: float
    noise: float = 0.0
    most: int = 1
    catch_up: float = 0.0

    @property
    def best(self) -> float:
        """Steps that a token takes with the best number of guesses."""
        return min(
            (1 + self.cost * guesses) / sum(self.acceptance**right for right in range(guesses + 1))
            for guesses in range(self.most + 1)
        )


def run(world: World, length: int, *, seed: int = 0, pace: Pace | None = None) -> tuple[float, Pace]:
    """Steps that a token took, without the noise that the pace sees; and the pace."""
    chance = random.Random(seed)
    pace = pace or Pace("auto", world.most)
    seconds, made, caught_up = 0.0, 0, False
    while made < length:
        guesses = min(pace.planned, length - made - 1)
        right = 0
        while right < guesses and chance.random() < world.acceptance:
            right += 1
        taken = 1 + world.cost * guesses
        usual = not guesses or caught_up or not world.catch_up
        if not usual:
            taken, caught_up = taken + world.catch_up, True
        seen = taken * max(0.2, chance.gauss(1, world.noise))
        pace.record(seen, guesses=guesses, right=right, read_bytes=150 if guesses else 100, is_usual=usual)
        seconds, made = seconds + taken, made + 1 + right
    return seconds / length, pace


ACCEPTANCES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COSTS = (0.05, 0.3, 0.5, 0.7, 0.9, 1.2, 2.0)


@pytest.mark.parametrize("most", [1, 3, 8, 16])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("acceptance", ACCEPTANCES)
@pytest.mark.parametrize("length", [256, 1000])
def test_it_never_loses_more_than_three_parts_of_a_hundred(
    acceptance: float, cost: float, length: int, most: int
) -> None:
    for seed in range(4):
        for noise in (0.0, 0.05):
            world = World(cost=cost, acceptance=acceptance, noise=noise, most=most)
            assert run(world, length, seed=seed)[0] <= 1.03, (seed, noise)


@pytest.mark.parametrize(("noise", "allowed"), [(0.1, 1), (0.2, 6)])
@pytest.mark.parametrize("most", [1, 3])
def test_noise_makes_it_lose_more_only_rarely(noise: float, allowed: int, most: int) -> None:
    """Of 1,200 runs of the length where a wrong verdict costs most."""
    lost = Counter[tuple[float, float]]()
    for cost in (0.3, 0.5, 0.7, 0.9, 1.2):
        for acceptance in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
            world = World(cost=cost, acceptance=acceptance, noise=noise, most=most)
            found = [run(world, 256, seed=seed)[0] for seed in range(40)]
            lost[cost, acceptance] += sum(one > 1.03 for one in found)
            assert max(found) < 1.06
    assert lost.total() <= allowed, lost


@pytest.mark.parametrize("cost", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("most", [1, 8])
def test_a_guess_dearer_than_a_step_is_soon_left(cost: float, most: int) -> None:
    used, pace = run(World(cost=cost, acceptance=0.9, most=most, noise=0.1), 1000)
    assert used < 1.02
    assert pace.places[0][1:] == [0] * (most - 1)


@pytest.mark.parametrize("cost", [5.0, 14.0])
def test_what_one_pass_takes_is_not_known_before_it(cost: float) -> None:
    """The least that finding out can cost is one pass; another has to wait until the run is long enough for both."""
    used, pace = run(World(cost=cost, acceptance=0.0), 256)
    assert used == pytest.approx(1 + cost / 256)
    assert pace.to_document()["passes"] == 1
    assert run(World(cost=cost, acceptance=0.0), 4000)[0] < 1.02


@pytest.mark.parametrize(
    ("cost", "acceptance", "most"),
    [(0.05, 0.6, 1), (0.3, 0.65, 1), (0.3, 0.85, 1), (0.6, 0.95, 1), (0.3, 0.85, 3), (0.6, 0.95, 3), (0.05, 0.6, 8)],
)
@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_it_takes_most_of_what_there_is_to_gain(cost: float, acceptance: float, most: int, noise: float) -> None:
    world = World(cost=cost, acceptance=acceptance, noise=noise, most=most)
    speeds = [1 / run(world, 1000, seed=seed)[0] for seed in range(8)]
    share = (sum(speeds) / len(speeds) - 1) / (1 / world.best - 1)
    assert share > 0.75


def test_several_guesses_a_pass_when_they_pay() -> None:
    _, pace = run(World(cost=0.2, acceptance=0.85, most=3), 1000)
    assert pace.places[0][2] > 100
    _, pace = run(World(cost=0.5, acceptance=0.7, most=8), 1000)
    assert pace.places[0][0] > 300
    assert pace.places[0][4] < 20


def test_a_trial_that_costs_a_long_catch_up_is_not_repeated() -> None:
    used, pace = run(World(cost=0.0, acceptance=0.0, catch_up=30.0), 1000)
    assert used < 1 + 31 / 1000
    assert pace.to_document()["passes"] == 1
    assert str(pace) == "1 pass with guesses, 0% of them right; left off"


def test_what_no_longer_pays_is_left_and_what_begins_to_pay_is_found() -> None:
    _, pace = run(World(cost=0.3, acceptance=0.9), 400)
    used, _ = run(World(cost=0.3, acceptance=0.05), 400, pace=pace)
    assert used < 1.06
    used, _ = run(World(cost=0.2, acceptance=0.9), 4000, pace=pace)
    assert used < 0.8


def test_a_step_that_becomes_faster_is_noticed() -> None:
    """As when experts have come into memory: what paid beside slow steps need not pay beside fast ones."""
    pace = Pace("auto", 1)
    for _ in range(40):
        pace.record(4.0, guesses=0, right=0, read_bytes=0, is_usual=True)
    used, _ = run(World(cost=1.2, acceptance=1.0), 2000, pace=pace)
    assert used < 1.03


@pytest.mark.parametrize("seed", range(5))
def test_what_one_guess_gained_does_not_pay_for_trials_with_two(seed: int) -> None:
    """Two cost six steps here: each trial ends behind its first pass, however much there was gained before."""
    chance, pace, made, dear = random.Random(seed), Pace("auto", 2), 0, 0
    while made < 500:
        guesses = pace.planned
        right = 0
        while right < guesses and chance.random() < 0.8:
            right += 1
        dear += guesses == 2
        pace.record((1.0, 1.2, 6.0)[guesses], guesses=guesses, right=right, read_bytes=0, is_usual=True)
        made += 1 + right
    assert 0 < dear <= 3


@pytest.mark.parametrize("most", [1, 3])
def test_on_is_on_whatever_it_costs(most: int) -> None:
    pace = Pace("on", most)
    used, _ = run(World(cost=2.0, acceptance=0.0), 100, pace=pace)
    assert used == pytest.approx((99 * (1 + 2 * most) + 1 - (most - 1) * most) / 100)
    assert str(pace).startswith("99 passes with guesses, 0% of them right; ")


def test_nothing_is_tried_before_steps_are_known() -> None:
    pace = Pace("auto", 1)
    pace.record(50.0, guesses=0, right=0, read_bytes=0, is_usual=False)  # a prompt
    for _ in range(BASELINE):
        assert pace.planned == 0
        pace.record(1.0, guesses=0, right=0, read_bytes=0, is_usual=True)
    assert pace.planned == 1
    assert str(pace) == "no guesses were made: the text is too short to try"
    assert pace.to_document()["step_s"] == 1.0


def steps(pace: Pace, count: int) -> None:
    for _ in range(count):
        pace.record(2.0, guesses=0, right=0, read_bytes=1_000_000, is_usual=True)


def test_it_says_what_it_found() -> None:
    pace = Pace("auto", 1)
    steps(pace, BASELINE)
    for right in (1, 1, 0, 1):
        assert pace.planned == 1
        pace.record(3.0, guesses=1, right=right, read_bytes=1_500_000, is_usual=True)
        steps(pace, 1)
    said = (
        "4 passes with guesses, 75% of them right; a pass took 1.50 steps and gave 1.75 tokens, read 1.50 times the "
        "1.00 MB of a step: 1.17 times as fast"
    )
    assert str(pace) == said + "; kept on"
    document = pace.to_document()
    assert document["speedup"] == pytest.approx(2 * 1.75 / 3)
    assert (document["passes"], document["guesses"], document["acceptance"]) == (4, 4, 0.75)
    assert (document["guesses_per_pass"], document["acceptance_by_place"]) == (1, [0.75])
    assert (document["pass_read_bytes"], document["step_read_bytes"]) == (1_500_000, 1_000_000)


def test_it_says_what_came_of_it() -> None:
    soon = run(World(cost=0.2, acceptance=0.9), BASELINE + 2)[1]
    assert str(soon).endswith("times as fast; not decided yet")
    paid = run(World(cost=0.2, acceptance=0.9), 300)[1]
    assert str(paid).endswith("times as fast; kept on")
    lost = run(World(cost=1.2, acceptance=0.5), 60)[1]
    assert str(lost).endswith("times as fast; left off")
    fewer = run(World(cost=0.6, acceptance=0.9, most=2), 100)[1]
    assert "; a pass with 2 took 2.20 steps and gave " in str(fewer)
    assert str(fewer).endswith("times as fast; stays with 1")
