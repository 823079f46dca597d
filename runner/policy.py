"""Which expert goes when room is needed: least recently used."""

from collections.abc import Hashable, Iterable


class Policy:
    def __init__(self) -> None:
        self._order: dict[Hashable, None] = {}
        self._locked: dict[Hashable, int] = {}
        self._pinned: set[Hashable] = set()

    def tick(self) -> None: ...

    def touch(self, key: Hashable) -> None:
        self._order.pop(key, None)
        self._order[key] = None

    admit = touch

    def lock(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self._locked[key] = self._locked.get(key, 0) + 1

    def unlock(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            if key in self._locked:
                self._locked[key] -= 1
                if not self._locked[key]:
                    del self._locked[key]

    def pin(self, keys: Iterable[Hashable]) -> None:
        self._pinned.update(keys)

    def victim(self):
        return next(key for key in self._order if key not in self._locked and key not in self._pinned)

    def forget(self, key: Hashable) -> None:
        self._order.pop(key, None)
