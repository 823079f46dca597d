"""Shows on a terminal how much comes from a server while nothing else can be shown yet.

Knows numbers and the terminal. It must not import torch.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from runner.cli_options import hides_bar

if TYPE_CHECKING:
    from runner.loaded import LoadedModel

_PAUSE_S = 0.2


@contextmanager
def showing_fetched(loaded: LoadedModel, *, quiet: bool) -> Iterator[None]:
    """Show what is fetched meanwhile; nothing where no server is asked, or stderr is no terminal."""
    if loaded.contents.cache is None:
        yield
        return
    from tqdm import tqdm

    begin, is_over = loaded.weights.fetched_bytes, threading.Event()
    with tqdm(
        desc="fetched", unit="B", unit_scale=True, leave=False, disable=hides_bar(quiet=quiet), file=sys.stderr
    ) as bar:
        if bar.disable:
            yield
            return

        def follow() -> None:
            while not is_over.wait(_PAUSE_S):
                bar.update(loaded.weights.fetched_bytes - begin - bar.n)

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def until_first(pieces: Iterable[str], loaded: LoadedModel, *, quiet: bool) -> Iterator[str]:
    """Pass on pieces of text; what is fetched is shown until the first one is there."""
    rest = iter(pieces)
    with showing_fetched(loaded, quiet=quiet):
        first = next(rest, None)
    if first is not None:
        yield first
        yield from rest
