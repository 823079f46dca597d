"""Which cases there are for a scenario, as tasks for the workers; all of them, or a sample."""

from __future__ import annotations

from typing import Any

from harness.flips import HALF, WHOLE
from harness.orders import KINDS, cases, sample
from harness.pool import Pool
from harness.scenarios import SCENARIOS

CHANCE, FLIP, DISCARD = "chance", "flip", "discard"
ALL_KINDS = (*KINDS, DISCARD, FLIP, CHANCE)
LARGE_NAMES = tuple(name for name in SCENARIOS if name.endswith("-large"))
"""Those that take long enough for a kill at a random moment."""
NAMES = tuple(name for name in SCENARIOS if name not in LARGE_NAMES)
DISCARD_NAMES = tuple(name for name in NAMES if SCENARIOS[name].command[1] in ("run", "restore"))
FLIP_STATES = {"run": (WHOLE, *HALF), "consume": HALF, "restore": HALF, "restore-consume": HALF, "run-zstd": (WHOLE,)}
FLIP_PARTS = 4

Task = dict[str, Any]


def tasks_of(pool: Pool, name: str, kind: str, *, limit: int | None = None, rounds: int = 0) -> list[Task]:
    """The tasks of a kind for a scenario; at most `limit` cases (of each state), and its share of the random rounds."""
    if kind == CHANCE:
        if name not in LARGE_NAMES:
            return []
        share, more = divmod(rounds, len(LARGE_NAMES))
        share += LARGE_NAMES.index(name) < more
        return [{"do": CHANCE, "scenario": name, "seed": seed} for seed in range(share)]
    if name in LARGE_NAMES or (kind == DISCARD and name not in DISCARD_NAMES):
        return []
    if kind == FLIP:
        return [
            {
                "do": FLIP,
                "scenario": name,
                "state": state,
                "part": part,
                "parts": FLIP_PARTS,
                "limit": limit and limit // FLIP_PARTS,
            }
            for state in FLIP_STATES.get(name, ())
            for part in range(FLIP_PARTS)
        ]
    texts = cases(kind, require(pool.ask({"do": "steps", "scenario": name})))
    # Readers are asked after kills, where nothing was cleaned up.
    return [
        {"do": "case", "scenario": name, "faults": text, "readers": kind == "kill"}
        for text in (texts if limit is None else sample(texts, limit))
    ]


def require(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer that is no complaint."""
    if answer.get("wrong"):
        raise RuntimeError(answer["wrong"])
    return answer


def describe(answer: dict[str, Any]) -> str:
    """What is wrong with a case, and how to do it again where there is a way."""
    task = answer["task"]
    if task["do"] == "case":
        return f"{answer['wrong']}\n      again: sweep.py --case '{task['scenario']} {task['faults']}'"
    return f"{task['scenario']} {task.get('state') or task.get('seed')}: {answer['wrong']}"
