"""How long work shows itself: a bar with bytes, rate and time left on a terminal, silence elsewhere.

`verify` and `restore` count bytes read; `run` counts bytes written.
"""

import sys
import threading
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Progress:
    """A byte counter that several threads may advance. Use as a context manager."""

    def __init__(self, total_bytes: int, *, label: str, quiet: bool) -> None:
        # disable=None: tqdm draws only where stderr is a terminal.
        self._bar = tqdm(
            total=total_bytes,
            desc=label,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=True if quiet else None,
        )
        self._lock = threading.Lock()
        self.bytes = 0

    def advance(self, count: int) -> None:
        """Count bytes that are done."""
        with self._lock:
            self.bytes += count
            self._bar.update(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
