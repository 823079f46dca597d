"""Which routed experts are in memory: a window of slots, one expert in each, within a budget.

What is missing is asked for at once and arrives in the background; what must make room is the policy's choice. This
file knows files' layouts and addresses; it must not know mathematics.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from manifests.errors import IntegrityError, ResourceError
from runner.background import Background, Load
from runner.layout import Layout
from runner.memory import Guard, Region, dtype_of
from runner.policy import Key, Policy
from runner.reading import Way

GROUP_EXPERTS = 16
"""Experts that are asked for together: enough for the disk, few enough that the next group arrives meanwhile."""

URGENT = 1
"""Of what is waited for now."""


@dataclass(slots=True, kw_only=True, eq=False)
class HeldExpert:
    """One expert that is in memory, or on its way.

    Attributes:
        key: Layer and expert.
        slot: Where it lies.
        layout: How.
        load: Its arrival.
        tensors: Views of its tensors by name; valid while the expert is locked.
        prepared: Whatever its user makes of the tensors once, to be kept as long as they are.
    """

    key: Key
    slot: int
    layout: Layout
    load: Load
    tensors: dict[str, Tensor]
    prepared: Any = field(default=None)

    def encoding(self, name: str) -> str:
        """What the bytes of one of its tensors encode."""
        return self.layout.places[name].encoding


@dataclass(slots=True, kw_only=True)
class Counters:
    """What the window did so far.

    Attributes:
        hits: Experts that were in memory when asked for.
        misses: Experts that were read.
        read_bytes: Of these.
        wait_s: Seconds that somebody waited for them.
    """

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    wait_s: float = 0.0


class ExpertWindow:
    """Slots for routed experts.

    Args:
        layout_of: Gives an expert's layout; raises ToolkitError where the checkpoint lacks it.
        slots: Experts that may be in memory at once, at least 1.
        slot_bytes: Addresses for one, whole pages.
        way: How they come in.
        background: Who brings them in.
        policy: Which goes when room is needed.

    Attributes:
        slots: As given.
        counters: What it did so far.
    """

    def __init__(
        self,
        layout_of: Callable[[Key], Layout],
        *,
        slots: int,
        slot_bytes: int,
        way: Way,
        background: Background,
        policy: Policy,
    ) -> None:
        self.slots = slots
        self.counters = Counters()
        self._layout_of = layout_of
        # Each begins at a huge page, or where direct reading wants it.
        self._slot_bytes = -(-slot_bytes // way.alignment) * way.alignment
        self._way = way
        self._background = background
        self._policy = policy
        self._region: Region | None = None  # reserved when the first expert comes
        self._guard: Guard | None = None
        self._held: dict[Key, HeldExpert] = {}
        self._pinned = 0
        self._slots = [_Slot() for _ in range(slots)]
        self._unused = list(range(slots - 1, -1, -1))
        self._is_torn = False  # a use is under way, or was interrupted

    @property
    def held(self) -> Collection[Key]:
        """The experts that are in memory or on their way."""
        return self._held.keys()

    @property
    def held_bytes(self) -> int:
        """Bytes of these."""
        return sum(expert.layout.needed_bytes for expert in self._held.values())

    def tick(self) -> None:
        """A pass through the model begins: the policy's clock."""
        self._policy.tick()

    def pin(self, keys: Sequence[Key]) -> None:
        """Bring experts in and keep them as long as the model lives; at least one slot must be left for others.

        Raises:
            ToolkitError: See `groups`.
        """
        self._is_torn = True
        for at in range(0, len(keys), GROUP_EXPERTS):
            some = keys[at : at + GROUP_EXPERTS]
            self._want(some)
            try:
                for key in some:
                    self._arrive(self._held[key])
            finally:
                self._policy.unlock(some)
            self._policy.pin(some)
            self._pinned += len(some)
        self._is_torn = False

    def groups(self, layer: int, experts: Sequence[int]) -> Iterator[Iterator[list[HeldExpert]]]:
        """Give the experts of one layer, in groups that follow their order; the next group arrives meanwhile.

        Each group gives its members as they arrive, at first those that are there already, which may be none. Their
        memory is theirs until the next group is asked for.

        Raises:
            ToolkitError: What `layout_of` raised, or the disk gave; see `reading.Way.load`.
            IntegrityError: A file was cut while its expert was in use.
        """
        if self._is_torn:
            self._mend()
        self._is_torn = True
        slots = self.slots - self._pinned
        size = min(slots, GROUP_EXPERTS)
        if len(experts) > size:
            size = max(1, min(GROUP_EXPERTS, slots // 4))
        most = 2 if 2 * size <= slots else 1
        keys = [(layer, expert) for expert in experts]
        waiting = deque(keys[at : at + size] for at in range(0, len(keys), size))
        asked: deque[list[Key]] = deque()
        # What is there already and has its turn later must not make room for what comes before it.
        kept = {key for key in keys[most * size :] if key in self._held}
        kept = set(sorted(kept)[: slots - most * size])
        self._policy.lock(kept)
        try:
            while waiting or asked:
                while waiting and len(asked) < most:
                    self._want(waiting[0])
                    asked.append(waiting.popleft())
                    self._policy.unlock(kept.intersection(asked[-1]))
                    kept.difference_update(asked[-1])
                yield self._arrivals(asked[0])
                self._check(asked[0])
                self._policy.unlock(asked.popleft())
        finally:
            self._policy.unlock(kept)
            for some in asked:
                self._policy.unlock(some)
        self._is_torn = False

    def _want(self, keys: Sequence[Key]) -> None:
        """Lock these experts and ask for those that are missing, in this order."""
        for key in keys:
            self._policy.touch(key)
        # Before anything is evicted: what is missing must not take the place of what is there.
        self._policy.lock(keys)
        try:
            for key in keys:
                if key in self._held:
                    self.counters.hits += 1
                else:
                    self._admit(key)
        except BaseException:
            self._policy.unlock(keys)
            raise

    def _admit(self, key: Key) -> None:
        layout = self._layout_of(key)
        for name, place in layout.places.items():
            dtype_of(name, place.dtype, place.encoding)  # refused before its size is
        if layout.size > self._slot_bytes:
            raise IntegrityError(
                f"expert {key[1]} of layer {key[0]} takes {layout.size} bytes, others {self._slot_bytes}; "
                "run `manifests check`"
            )
        if self._region is None:
            self._region = Region(self.slots * self._slot_bytes)
            self._guard = self._way.guard(self._region, self._slot_bytes)
        if not self._unused:
            self._evict()
        number = self._unused[-1]
        slot, position = self._slots[number], number * self._slot_bytes
        tensors = self._region.tensors(layout, position)
        slot.turn += 1
        work = partial(_bring_in, slot, slot.turn, self._way, layout, self._region, position, self._guard, number)
        load = self._background.submit(work, urgency=URGENT)
        self._held[key] = HeldExpert(key=key, slot=number, layout=layout, load=load, tensors=tensors)
        self._unused.pop()
        self._policy.admit(key)
        self.counters.misses += 1
        self.counters.read_bytes += layout.needed_bytes

    def _evict(self) -> None:
        victim = self._policy.victim()
        if victim is None:
            raise ResourceError("every expert in memory is in use; give more --ram")
        self._drop(self._held[victim])

    def _mend(self) -> None:
        """What an interrupt left: it may come between any two steps here, and the next pass must not feel it."""
        self._policy.unlock_all()
        used = {expert.slot for expert in self._held.values()}
        if len(used) + len(self._unused) != self.slots or not used.isdisjoint(self._unused):
            self._unused = [number for number in range(self.slots) if number not in used]
        if len(self._policy) != len(self._held):
            self._policy.hold(self._held)

    def _arrivals(self, keys: Sequence[Key]) -> Iterator[list[HeldExpert]]:
        missing = deque(self._held[key] for key in keys)
        there = [expert for expert in missing if expert.load.is_done]
        while True:
            for expert in there:
                self._arrive(expert)
            yield there
            missing = deque(expert for expert in missing if expert not in there)
            if not missing:
                return
            self._arrive(missing[0])
            there = [expert for expert in missing if expert.load.is_done]

    def _arrive(self, expert: HeldExpert) -> None:
        """Wait for an expert; one that did not come is not held."""
        begin = None if expert.load.is_done else time.perf_counter()
        try:
            expert.load.wait()
        except Exception:
            self._drop(expert)
            raise
        finally:
            if begin is not None:
                self.counters.wait_s += time.perf_counter() - begin

    def _check(self, keys: Sequence[Key]) -> None:
        for key in keys:
            expert = self._held[key]
            try:
                if self._guard is not None and self._guard.is_broken(expert.slot):
                    names = ", ".join(self._way.where(run) for run in expert.layout.runs)
                    raise IntegrityError(f"{names}: was cut while in use; copy it back and start again")
                self._way.check(expert.layout)
            except Exception:
                self._drop(expert)
                raise

    def _drop(self, expert: HeldExpert) -> None:
        if self._held.get(expert.key) is expert:
            del self._held[expert.key]
            self._policy.forget(expert.key)
            self._unused.append(expert.slot)


class _Slot:
    """A place for one expert.

    Attributes:
        turn: Counts those that were given the place; who is not the last any more stays away.
        lock: Held by whoever brings one in.
        layout: What lies there.
    """

    __slots__ = ("layout", "lock", "turn")

    def __init__(self) -> None:
        self.turn = 0
        self.lock = threading.Lock()
        self.layout: Layout | None = None


def _bring_in(
    slot: _Slot,
    turn: int,
    way: Way,
    layout: Layout,
    region: Region,
    position: int,
    guard: Guard | None,
    number: int,
) -> None:
    with slot.lock:
        if slot.turn != turn:
            return  # nobody waits for it: it was asked for by a pass that was interrupted
        if slot.layout is not None:
            way.unload(slot.layout, region, position)
        if guard is not None:
            guard.renew(number)
        slot.layout = layout  # also when only a part of it comes in
        way.load(layout, region, position)
