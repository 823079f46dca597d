"""Whether the harness can tell a program that survives from one that does not."""

from __future__ import annotations

import errno

import pytest
from harness.faults import Cut, Fail, Fault, Kill, Power, Short, Step, parse
from harness.orders import KINDS, cases, sample
from harness.pool import Pool
from harness.tasks import require, tasks_of
from harness.toy import SPOILED


def wrong(pool: Pool, name: str, kind: str, limit: int | None = None) -> list[str]:
    return [answer["wrong"] for answer in pool.map(tasks_of(pool, name, kind, limit=limit)) if answer["wrong"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_program_survives_everything(pool: Pool, kind: str) -> None:
    assert wrong(pool, "toy-right", kind, 24) == []


@pytest.mark.parametrize(("twin", "kind"), [item for item in SPOILED.items() if item[1] != "steps"])
def test_a_program_that_lacks_something_is_found_out(pool: Pool, twin: str, kind: str) -> None:
    assert wrong(pool, f"toy-{twin}", kind, 24)


def test_a_program_that_writes_past_the_layer_is_found_out(pool: Pool) -> None:
    answer = pool.ask({"do": "case", "scenario": "toy-past-the-layer", "faults": "none"})
    assert "the model does not know: other bytes in dst/" in answer["wrong"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(),
        Kill(3, "half"),
        Power(4, "mix:7"),
        Cut("unlink", 2, "mix:7"),
        Fail("fsync", 2, errno.EIO, False),
        Fail("open", 1, errno.ENOSPC, True),
        Short("read", 0),
        Short("write", 9),
    ],
    ids=str,
)
def test_a_fault_is_its_text(fault: Fault) -> None:
    assert parse(str(fault)) == fault
    assert type(parse(str(fault))) is type(fault)


def test_a_failure_is_once_or_from_then_on() -> None:
    steps = [Step("open", "x", number, 0, 0) for number in range(1, 5)]
    assert [Fail("open", 2, 5, False).fails(step) for step in steps] == [None, 5, None, None]
    assert [Fail("open", 2, 5, True).fails(step) for step in steps] == [None, 5, 5, 5]
    assert [Fail("close", 2, 5, True).fails(step) for step in steps] == [None] * 4


def test_cases_cover_every_point_and_call() -> None:
    found = {
        "points": ["mkdir", "open", "pwrite", "fsync"],
        "calls": ["pread", "open", "create", "open", "pread", "pwrite"],
    }
    assert cases("kill", found) == [
        *("kill:1:before", "kill:1:after", "kill:2:before", "kill:2:after"),
        *("kill:3:before", "kill:3:half", "kill:4:before", "kill:4:after"),
    ]
    assert {text.split(":")[1] for text in cases("power", found)} == {"1", "2", "3", "4"}
    failures = cases("fail", found)
    assert len(failures) == len(set(failures)) == (2 + 2 + 3 + 2 + 1 + 1) * 2
    assert [text for text in failures if "open" in text and "ENOSPC" in text] == [
        "fail:open:2:ENOSPC:once",
        "fail:open:2:ENOSPC:on",
    ]
    assert cases("short", found) == [
        *("short:read:all", "short:read:1", "short:read:2", "short:write:all", "short:write:1")
    ]
    assert cases("twice", found) == cases("twice", found)


def test_a_sample_is_spread_and_keeps_both_ends() -> None:
    texts = [str(number) for number in range(100)]
    found = sample(texts, 10)
    assert found == sample(texts, 10)
    assert (found[0], found[-1], len(set(found))) == ("0", "99", 10)
    assert [int(text) // 10 for text in found] == list(range(10))
    assert sample(texts, 200) == texts


def test_the_calls_of_the_toy_are_all_seen(pool: Pool) -> None:
    found = require(pool.ask({"do": "steps", "scenario": "toy-right"}))
    shards = 9
    assert found["points"].count("rename") == found["points"].count("unlink") == shards
    assert found["points"].count("fsync") == 2 * shards + 4
    assert found["calls"].count("create") == shards + 1
    assert found["calls"].count("open") == 2 * shards + 3
