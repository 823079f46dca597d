"""All faults that a scenario can meet, as texts: from the calls of one undisturbed run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from harness.faults import READS, WRITES
from harness.model import VARIANTS

ERRORS = {
    "open": ("EIO", "EMFILE"),
    "create": ("EIO", "ENOSPC", "EMFILE"),
    "write": ("ENOSPC", "EIO"),
    "pwrite": ("ENOSPC", "EIO"),
    "fsync": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC"),
    "mkdir": ("ENOSPC", "EIO"),
    "ftruncate": ("EIO", "ENOSPC"),
}
"""What each call fails with; all others with EIO."""

T = TypeVar("T")

KINDS = ("kill", "power", "fail", "short", "twice")
TWICE = 300
REMOVALS = (1, 2, 3, 5, 8, 20)
"""The first are of what was left half-made, later ones free what was used up."""
"""Cases with two or three faults one after the other, drawn by chance."""


def kills(points: Sequence[str]) -> Iterator[str]:
    """Before and after every durable step; before and in the middle of every write."""
    for number, call in enumerate(points, start=1):
        yield f"kill:{number}:before"
        yield f"kill:{number}:{'half' if call in WRITES else 'after'}"


def power_cuts(points: Sequence[str], mixes: int = 2) -> Iterator[str]:
    """Every variant at every point. What was done at one point is what can be lost at the next."""
    for number in range(1, len(points) + 1):
        for variant in (*VARIANTS, *(f"mix:{number * 10 + mix}" for mix in range(mixes))):
            yield f"power:{number}:{variant}"


def failures(calls: Sequence[str]) -> Iterator[str]:
    """Every call once, and from then on."""
    numbers: Counter[str] = Counter()
    for call in calls:
        name = "open" if call == "create" else call
        numbers[name] += 1
        for code in ERRORS.get(call, ("EIO",)):
            for how in ("once", "on"):
                yield f"fail:{name}:{numbers[name]}:{code}:{how}"


def short_requests(calls: Sequence[str]) -> Iterator[str]:
    """Every read and every write, and all of them."""
    for kind, names in (("read", READS), ("write", WRITES)):
        yield f"short:{kind}:all"
        for number in range(1, max(map(calls.count, names)) + 1):
            yield f"short:{kind}:{number}"


def several(points: Sequence[str], calls: Sequence[str], count: int = TWICE) -> Iterator[str]:
    """Two or three faults, one for each run of the command."""
    # What is written and not yet durable when a run is killed is there for the next one to see, and to rely on.
    for number, call in enumerate(points, start=1):
        if call == "fsync":
            for removal in REMOVALS:
                yield f"kill:{number}:before+cut:unlink:{removal}:removals"
    for number in range(1, calls.count("fsync") + 1):
        yield f"fail:fsync:{number}:EIO:once+cut:unlink:1:removals"
    chance = random.Random(count)
    single = [*kills(points), *power_cuts(points), *failures(calls)]
    # A resumed run has less to do, so its fault comes early.
    early = [*kills(points[:60]), *power_cuts(points[:60])]
    for _ in range(count):
        yield "+".join([chance.choice(single), *chance.choices(early, k=chance.choice((1, 1, 2)))])


def discards(points: Sequence[str]) -> Iterator[str]:
    """A killed run is not continued but discarded; and that may be killed or lose its power too."""
    chance = random.Random(len(points))
    for number in range(1, len(points) + 1):
        yield f"kill:{number}:before+discard/none"
        yield f"kill:{number}:before+discard/kill:{chance.randint(1, 80)}:before"
        yield f"kill:{number}:before+discard/power:{chance.randint(1, 80)}:{chance.choice(VARIANTS)}"


def cases(kind: str, found: Mapping[str, Sequence[str]]) -> list[str]:
    """All cases of a kind, from what `cases.steps_of` found."""
    points, calls = found["points"], found["calls"]
    match kind:
        case "kill":
            return list(kills(points))
        case "power":
            return list(power_cuts(points))
        case "fail":
            return list(failures(calls))
        case "short":
            return list(short_requests(calls))
        case "discard":
            return list(discards(points))
        case "twice":
            return list(several(points, calls))
    raise ValueError(kind)


def sample(texts: Sequence[T], count: int, seed: int = 0) -> list[T]:
    """At most so many, evenly spread, the first and the last among them."""
    if count >= len(texts):
        return list(texts)
    chance = random.Random(seed)
    width = len(texts) / count
    inner = [texts[int((number + chance.random()) * width)] for number in range(1, count - 1)]
    return [texts[0], *inner, texts[-1]]
