"""A sample of every kind of fault for every command; the whole of it as a slow test, and as `sweep.py`."""

from __future__ import annotations

from itertools import product

import pytest
from harness.orders import KINDS
from harness.pool import Pool
from harness.tasks import (
    CHANCE,
    DISCARD,
    DISCARD_NAMES,
    FLIP,
    FLIP_STATES,
    LARGE_NAMES,
    NAMES,
    describe,
    require,
    tasks_of,
)

CASES = [*product(NAMES, KINDS), *((name, DISCARD) for name in DISCARD_NAMES)]
SAMPLES = {"kill": 8, "power": 9, "fail": 8, "short": 2, "twice": 3, "discard": 3}
FLIPS = 8
ROUNDS, MANY_ROUNDS = 10, 200


def check(pool: Pool, name: str, kind: str, *, limit: int | None = None, rounds: int = 0) -> int:
    """Do the cases; how many there were."""
    tasks = tasks_of(pool, name, kind, limit=limit, rounds=rounds)
    answers = list(pool.map(tasks))
    wrong = [describe(answer) for answer in answers if answer["wrong"]]
    assert not wrong, f"{len(wrong)} of {len(tasks)}:\n  " + "\n  ".join(wrong[:10])
    return sum(answer.get("cases", 1) for answer in answers)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_disturbed_command_ends_as_an_undisturbed_one(pool: Pool, name: str, kind: str) -> None:
    assert check(pool, name, kind, limit=SAMPLES[kind]) == SAMPLES[kind]


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        # The folder was made by a run that was killed before it synced the one above.
        ("restore-gguf", "kill:2:before+cut:unlink:2:removals"),
        ("consume-gguf", "kill:2:before+cut:unlink:5:removals"),
        ("consume", "kill:2:before+cut:unlink:20:removals"),
    ],
)
def test_what_was_lost_once(pool: Pool, name: str, faults: str) -> None:
    answer = pool.ask({"do": "case", "scenario": name, "faults": faults, "readers": True})
    assert not require(answer)["wrong"]
    assert answer["fired"]


@pytest.mark.parametrize("name", FLIP_STATES)
def test_a_flipped_bit_is_found_and_named(pool: Pool, name: str) -> None:
    assert check(pool, name, FLIP, limit=FLIPS) == FLIPS * len(FLIP_STATES[name])


def test_kills_at_random_moments(pool: Pool) -> None:
    assert sum(check(pool, name, CHANCE, rounds=ROUNDS) for name in LARGE_NAMES) == ROUNDS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [*CASES, *((name, FLIP) for name in FLIP_STATES)])
def test_every_fault_at_every_point(pool: Pool, name: str, kind: str) -> None:
    assert check(pool, name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_NAMES)
def test_many_kills_at_random_moments(pool: Pool, name: str) -> None:
    assert check(pool, name, CHANCE, rounds=MANY_ROUNDS)


@pytest.mark.parametrize("name", [*NAMES, *LARGE_NAMES])
def test_the_undisturbed_end_is_right_and_worth_disturbing(pool: Pool, name: str) -> None:
    require(pool.ask({"do": "prove", "scenario": name}))
    found = require(pool.ask({"do": "steps", "scenario": name}))
    assert len(found["points"]) > 30
    assert {"open", "pwrite", "fsync"} <= set(found["points"])
    # A constant that got another name would leave a way of the product untried.
    assert found["settings"] == ["BLOCK_BYTES", "CHUNK_BYTES", "DIRECT_MIN_BYTES", "RING_BLOCKS"]
