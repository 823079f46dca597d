"""What can be ordered: to be killed, a power cut, a call that fails, short reads and writes. A fault is also a text.

    kill:K:before | after | half     at the K-th point: a change of the disk, counted from 1
    power:K:VARIANT                  before the K-th point, see `model.VARIANTS`; also mix:SEED
    cut:CALL:K:VARIANT               a power cut too, after the K-th call of an os function
    fail:CALL:K:ERRNO:once | on      the K-th call of an os function, and perhaps all later ones
    short:read | write:K | all       half of the bytes
    none

A command may also be given `--discard`: then its fault is written behind ``discard/``.

Text is what the sweep prints for a case that went wrong, and what it takes to do that case again.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import NamedTuple

READS = ("read", "pread", "preadv", "readv")
WRITES = ("write", "pwrite", "pwritev", "writev")


class Step(NamedTuple):
    """One call on a path below the root.

    Attributes:
        call: Name in `os`.
        path: Relative; of the second path for renames.
        number: Which call of this name, from 1.
        point: Which change of the disk, from 1; 0 for a call that changes nothing.
        size: Bytes of a read or write.
    """

    call: str
    path: str
    number: int
    point: int
    size: int


@dataclass(frozen=True, slots=True)
class Fault:
    """No fault; the others say what they do to a step."""

    def dies(self, step: Step) -> str | None:
        """When this step kills the process: before, half, after."""
        return None

    def crash(self) -> str | None:
        """The variant of the power cut that comes with the kill."""
        return None

    def fails(self, step: Step) -> int | None:
        """The errno with which this step fails."""
        return None

    def is_short(self, step: Step) -> bool:
        """Whether this read or write is cut."""
        return False

    def __str__(self) -> str:
        return "none"


@dataclass(frozen=True, slots=True)
class Kill(Fault):
    point: int
    when: str

    def dies(self, step: Step) -> str | None:
        return self.when if step.point == self.point else None

    def __str__(self) -> str:
        return f"kill:{self.point}:{self.when}"


@dataclass(frozen=True, slots=True)
class Power(Fault):
    point: int
    variant: str

    def dies(self, step: Step) -> str | None:
        return "before" if step.point == self.point else None

    def crash(self) -> str | None:
        return self.variant

    def __str__(self) -> str:
        return f"power:{self.point}:{self.variant}"


@dataclass(frozen=True, slots=True)
class Cut(Fault):
    call: str
    number: int
    variant: str

    def dies(self, step: Step) -> str | None:
        return "after" if (step.call, step.number) == (self.call, self.number) else None

    def crash(self) -> str | None:
        return self.variant

    def __str__(self) -> str:
        return f"cut:{self.call}:{self.number}:{self.variant}"


@dataclass(frozen=True, slots=True)
class Fail(Fault):
    call: str
    number: int
    code: int
    forever: bool

    def fails(self, step: Step) -> int | None:
        is_hit = step.number == self.number or (self.forever and step.number > self.number)
        return self.code if step.call == self.call and is_hit else None

    def __str__(self) -> str:
        return f"fail:{self.call}:{self.number}:{errno.errorcode[self.code]}:{'on' if self.forever else 'once'}"


@dataclass(frozen=True, slots=True)
class Short(Fault):
    """`number` counts the calls of each name for themselves; 0 is all of them."""

    kind: str
    number: int

    def is_short(self, step: Step) -> bool:
        calls = READS if self.kind == "read" else WRITES
        return step.call in calls and self.number in (0, step.number)

    def __str__(self) -> str:
        return f"short:{self.kind}:{self.number or 'all'}"


def parse(text: str) -> Fault:
    """A fault from its text."""
    kind, *parts = text.split(":", 2)
    match kind:
        case "none":
            return Fault()
        case "kill":
            return Kill(int(parts[0]), parts[1])
        case "power":
            return Power(int(parts[0]), parts[1])
        case "cut":
            number, variant = parts[1].split(":", 1)
            return Cut(parts[0], int(number), variant)
        case "fail":
            number, code, how = parts[1].split(":")
            return Fail(parts[0], int(number), getattr(errno, code), how == "on")
        case "short":
            return Short(parts[0], 0 if parts[1] == "all" else int(parts[1]))
    raise ValueError(f"{text}: no fault")
