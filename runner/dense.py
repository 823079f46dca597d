"""Everything but routed experts, in anonymous memory: the system cannot take it back, whatever else it needs room for.

A group is read whole when one of its tensors is asked for, and the groups behind it while it is used; it stays until it
is let go. This file knows layouts and addresses; it must not know what the tensors mean.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from runner.background import Background, Load
from runner.layout import Layout
from runner.memory import Region
from runner.reading import Direct

_AHEAD = 2
"""Groups that are read while one is used."""

_AT_ONCE = 2
_IN_TIME = 0


class DenseWeights:
    """Groups of tensors that stay in memory once they were read, but for those that are let go.

    Args:
        layout_of: Gives a group's layout.
        order: Groups in the order in which a pass uses them.
        way: How they come in.
        background: Who brings them in.

    Attributes:
        read_bytes: Bytes that were read so far.
        held_bytes: Those of them that were not let go.
        wait_s: Seconds that somebody waited for them.
    """

    def __init__(
        self, layout_of: Callable[[str], Layout], order: Sequence[str], way: Direct, background: Background
    ) -> None:
        self.read_bytes = self.held_bytes = 0
        self.wait_s = 0.0
        self._layout_of = layout_of
        self._order = list(order)
        self._number = {group: number for number, group in enumerate(order)}
        self._way = way
        self._background = background
        self._asked: dict[str, tuple[Load | None, dict[str, Tensor]]] = {}
        self._ready: dict[str, dict[str, Tensor]] = {}
        self._let_go: set[str] = set()

    def group(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group by name; they must not be written to.

        Raises:
            ToolkitError: See `reading.Way.load`.
        """
        found = self._ready.get(group)
        return self._arrive(group) if found is None else found

    def let_go(self, group: str) -> None:
        """Give a group's memory back, once nobody has a tensor of it; it is not read ahead again."""
        if self._ready.pop(group, None) is not None:
            del self._asked[group]
            self.held_bytes -= self._layout_of(group).needed_bytes
            self._let_go.add(group)

    def tensors(self) -> Iterator[Tensor]:
        """All that are in memory."""
        for group in self._ready.values():
            yield from group.values()

    def _arrive(self, group: str) -> dict[str, Tensor]:
        self._ask(group, _AT_ONCE)
        number = self._number.get(group)
        if number is not None:
            for ahead in self._order[number + 1 : number + 1 + _AHEAD]:
                if ahead not in self._let_go:
                    self._ask(ahead, _IN_TIME)
        load, tensors = self._asked[group]
        if load is not None:
            begin = time.perf_counter()
            try:
                load.wait()
            except BaseException:
                if load.is_done:
                    del self._asked[group]
                raise
            finally:
                self.wait_s += time.perf_counter() - begin
        self._ready[group] = tensors
        return tensors

    def _ask(self, group: str, urgency: int) -> None:
        if group in self._asked:
            return
        layout = self._layout_of(group)
        if not layout.size:
            self._asked[group] = None, {}
            return
        region = Region(layout.size)
        load = self._background.submit(partial(self._way.load, layout, region, 0), urgency=urgency)
        self._asked[group] = load, region.tensors(layout, 0)
        self.read_bytes += layout.needed_bytes
        self.held_bytes += layout.needed_bytes
