"""The full sweep: every fault at every point of every command, a table of the counts, and one JSON line.

python tests/faults/sweep.py                              everything; half an hour on two cores
python tests/faults/sweep.py run consume --kinds kill     some of it
python tests/faults/sweep.py --limit 20                   a sample of each
python tests/faults/sweep.py --case 'run kill:37:half'    one case again; faults of several runs joined by +
"""

# ruff: noqa: T201  # what it prints is what it is for

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

from harness.pool import Pool
from harness.scenarios import SCENARIOS
from harness.tasks import ALL_KINDS, CHANCE, describe, require, tasks_of

ROUNDS = 200
SHOWN = 5


def main() -> int:
    """Run what was asked for; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--kinds", nargs="+", choices=ALL_KINDS, default=ALL_KINDS)
    parser.add_argument("--case", metavar="'SCENARIO FAULTS'", help="one case")
    parser.add_argument("--limit", type=int, help="at most so many cases of a kind for a scenario")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="random kills")
    parser.add_argument("--workers", type=int, help="processes; as many as there are cores if not given")
    arguments = parser.parse_args()
    with Pool(arguments.workers) as pool:
        if arguments.case:
            name, faults = arguments.case.split()
            answer = pool.ask({"do": "case", "scenario": name, "faults": faults, "readers": True})
            print(json.dumps(answer, indent=2))
            return 1 if answer["wrong"] else 0
        return sweep(pool, arguments)


def sweep(pool: Pool, arguments: argparse.Namespace) -> int:
    """Everything that was asked for, with a table that grows."""
    started = time.perf_counter()
    totals: Counter[str] = Counter()
    points: dict[str, int] = {}
    wrong = kills = 0
    print(f"{'scenario':24} {'points':>7} {'kind':8} {'cases':>7} {'fired':>7} {'wrong':>6} {'s':>6}")
    for name in arguments.scenarios or SCENARIOS:
        points[name] = len(require(pool.ask({"do": "steps", "scenario": name}))["points"])
        for kind in arguments.kinds:
            begun = time.perf_counter()
            tasks = tasks_of(pool, name, kind, limit=arguments.limit, rounds=arguments.rounds)
            if not tasks:
                continue
            answers = list(pool.map(tasks))
            count = sum(answer.get("cases", 1) for answer in answers)
            bad = [answer for answer in answers if answer["wrong"]]
            fired = sum(int(answer.get("kills", answer.get("fired", answer.get("cases", 1)))) for answer in answers)
            seconds = time.perf_counter() - begun
            row = f"{name:24} {points[name]:7} {kind:8} {count:7} {fired:7} {len(bad):6} {seconds:6.1f}"
            print(row, flush=True)
            for answer in bad[:SHOWN]:
                print(f"    {describe(answer)}", flush=True)
            totals[kind] += count
            kills += fired if kind == CHANCE else 0
            wrong += len(bad)
    document = {
        "points": points,
        "cases": dict(totals),
        "random_kills": kills,
        "wrong": wrong,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(document))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
