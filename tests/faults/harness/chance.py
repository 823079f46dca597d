"""Kills at random moments, from outside: no order of calls is chosen, whatever is under way is cut off."""

from __future__ import annotations

import random
from typing import Any

from harness import child
from harness.cases import finish
from harness.model import Model
from harness.scenarios import Stage

KILLS = 5
"""A command that was killed so often is let through."""


def play(stage: Stage, seed: int) -> dict[str, Any]:
    """Kill and run again until a run ends by itself; then compare."""
    chance = random.Random(seed)
    stage.put_up()
    kills = 0
    for _ in range(KILLS):
        ended = child.look(stage.resolve(stage.scenario.command), kill_after=chance.uniform(0, stage.seconds))
        if ended.code >= 0:
            if ended.code > 0:
                return {"wrong": f"ends with {ended.code} after {kills} kills: {ended.err.strip()}", "kills": kills}
            break
        kills += 1
        if text := stage.changed():
            return {"wrong": f"after {kills} kills: {text}", "kills": kills}
    wrong, _ = finish(stage, Model(str(stage.root)))
    return {"wrong": wrong, "kills": kills}
