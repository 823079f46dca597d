"""Which experts stay in memory when not all of them fit: recent frequency, and the wait until the next chance of a use.

An expert's score is the sum over its uses of 2 ** (-age / half_life), its age counted in passes through the model
(LRFU). So how often it was used counts, also while it was out of memory; LRU alone keeps nothing where a pass uses
more experts than fit, since it always drops what the pass asks for next.

A layer is visited once per pass, in order. So an expert's age is that at its layer's next visit: one more pass for a
layer that was just computed than for one that is still to come. And a place in memory is worth what it finds per time
that it is held: the score is divided by the wait until that visit. Hence what was just read may be the first to leave.

Bookkeeping only: this file must not know files, memory or tensors. It is not safe to call from two threads at once.

Source: Lee et al., LRFU: a spectrum of policies that subsumes the LRU and LFU policies, IEEE ToC 50 (2001), for the
score; Beckmann et al., LHD: improving cache hit rate by maximizing hit density, NSDI (2018), for the division.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from heapq import heapify, heappop, heappush, heapreplace
from math import inf, log2

Key = tuple[int, int]
"""Layer and expert."""

HALF_LIFE = 8.0
"""Passes after which a use counts half."""

_Rank = tuple[float, int, Key | tuple[()]]
"""Score, last use, key: the least leaves first."""

_NOTHING: _Rank = (inf, 0, ())


class Policy:
    """The scores of all experts that were ever used, and which of them are in memory.

    All scores of a layer decay at the same rate, so their order only changes with a use. Kept is the logarithm of
    what a score would be at pass 0, log2(sum of 2 ** (pass / half_life)): it needs no update as time passes, and never
    overflows. It can only grow, so an entry of a layer's heap that is out of date is one that comes up too early; it
    is corrected when it does. A use costs O(1), and a victim O(log experts + layers), counting the uses before it in.

    Args:
        half_life: In passes; 0 is LRU, whatever the layer, and math.inf counts all uses alike.

    Raises:
        ValueError: The half life is negative or no number.
    """

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        if not half_life >= 0:
            raise ValueError(f"a half life of {half_life} passes")
        self._half_life = half_life
        self._pass = 0
        self._uses = 0
        self._score: dict[Key, float] = {}
        self._last: dict[Key, int] = {}
        # In memory: the number of the key's entry in its heap, 0 while it has none because it was locked.
        self._entry: dict[Key, int] = {}
        self._entries = 0
        self._heaps: dict[int, list[tuple[float, int, int, Key]]] = {}
        self._locked: Counter[Key] = Counter()
        self._pinned: set[Key] = set()
        # The places of the layers seen so far in their order, and the layer that is being computed.
        self._place: dict[int, int] = {}
        self._current: int | None = None
        self._logs: list[float] = []
        # The first of each heap, the same as things stand, and what of it is out of date.
        self._first: dict[int, _Rank] = {}
        self._rank: dict[int, _Rank] = {}
        self._changed: set[int] = set()
        self._moved = False

    def __contains__(self, key: Key) -> bool:
        """Whether it is in memory."""
        return key in self._entry

    def __len__(self) -> int:
        """How many are in memory."""
        return len(self._entry)

    def tick(self) -> None:
        """Begin a pass through the model."""
        self._pass += 1
        self._current = None
        self._moved = True

    def touch(self, key: Key) -> None:
        """Count a use in this pass, be the key in memory or not; its layer is the one that is being computed."""
        layer = key[0]
        self._know(layer)
        if layer != self._current:
            self._current = layer
            self._moved = True
        self._changed.add(layer)
        self._uses += 1
        self._last[key] = self._uses
        if not self._half_life:
            return  # equal scores: the order of last uses decides
        now = self._pass / self._half_life
        before = self._score.get(key, -inf)
        self._score[key] = max(before, now) + log2(1 + 2.0 ** -abs(before - now))

    def admit(self, key: Key) -> None:
        """Note that a key is in memory from now on."""
        if key not in self._entry:
            self._know(key[0])
            self._push(key)

    def forget(self, key: Key) -> None:
        """Note that a key is no longer in memory. Its score stays: it may come back."""
        if self._entry.pop(key, None) is not None:
            self._changed.add(key[0])

    def pin(self, keys: Iterable[Key]) -> None:
        """Never give these as victims."""
        for key in keys:
            self._pinned.add(key)
            self._change(key)

    def lock(self, keys: Iterable[Key]) -> None:
        """Do not give these as victims until each was unlocked as often as it was locked."""
        for key in keys:
            self._locked[key] += 1
            self._change(key)

    def unlock(self, keys: Iterable[Key]) -> None:
        """Undo one lock of each."""
        for key in keys:
            self._locked[key] -= 1
            if self._locked[key] <= 0:
                del self._locked[key]
                if self._entry.get(key) == 0:
                    self._push(key)

    def unlock_all(self) -> None:
        """Undo all locks."""
        self.unlock([key for key, count in self._locked.items() for _ in range(count)])

    def hold(self, keys: Collection[Key]) -> None:
        """Note that these, and no others, are in memory."""
        for key in [key for key in self._entry if key not in keys]:
            self.forget(key)
        for key in keys:
            self.admit(key)

    def victim(self) -> Key | None:
        """Give the key in memory that is worth least, of equal ones that which was unused for longest.

        It stays until `forget`. None where all are locked or pinned.
        """
        for layer in self._changed:
            self._first[layer] = self._find_first(layer)
        # Before a pass's first layer, all of them are to come.
        current = -1 if self._current is None else self._place[self._current]
        for layer in self._place if self._moved else self._changed:
            score, last, key = self._first[layer]
            self._rank[layer] = (score - self._price(self._place[layer] - current), last, key)
        self._changed.clear()
        self._moved = False
        return min(self._rank.values(), default=_NOTHING)[2] or None

    def _price(self, wait: int) -> float:
        """What turns a stored score into that at the layer's next visit, divided by the wait until then.

        Args:
            wait: Layers from the one that is being computed to this one; if not above 0, its visit is over.
        """
        if not self._half_life:
            return 0.0
        if wait > 0:
            return self._pass / self._half_life + self._logs[wait]
        return (self._pass + 1) / self._half_life + self._logs[wait + len(self._place)]

    def _know(self, layer: int) -> None:
        """Make room for a layer that was never seen."""
        if layer not in self._heaps:
            self._heaps[layer] = []
            self._place = {each: place for place, each in enumerate(sorted(self._heaps))}
            self._logs = [0.0, *(log2(wait) for wait in range(1, len(self._heaps) + 1))]
            self._changed.add(layer)
            self._moved = True

    def _change(self, key: Key) -> None:
        if key in self._entry:
            self._changed.add(key[0])

    def _find_first(self, layer: int) -> _Rank:
        """The stored score of the layer's key that is to leave first, with its last use."""
        heap = self._heaps[layer]
        while heap:
            score, last, number, key = heap[0]
            if self._entry.get(key) != number:
                heappop(heap)
            elif key in self._locked or key in self._pinned:
                heappop(heap)
                self._entry[key] = 0
            elif last != self._last.get(key, 0):
                heapreplace(heap, self._make_entry(key))
            else:
                return score, last, key
        return _NOTHING

    def _push(self, key: Key) -> None:
        heap = self._heaps[key[0]]
        if len(heap) > 2 * len(self._entry) + 64:
            # Left by keys that were forgotten without having been victims.
            heap[:] = [entry for entry in heap if self._entry.get(entry[3]) == entry[2]]
            heapify(heap)
        heappush(heap, self._make_entry(key))
        self._changed.add(key[0])

    def _make_entry(self, key: Key) -> tuple[float, int, int, Key]:
        self._entries += 1
        self._entry[key] = self._entries
        return self._score.get(key, -inf), self._last.get(key, 0), self._entries, key
