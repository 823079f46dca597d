"""``--json`` of commands that take long: one JSON document per line on stdout, each written out at once.

Every line has ``event``: ``begin``, then ``progress``, ``shard`` and ``remark`` as they come, and last ``end`` with the
result. A stream without ``end`` is that of a command that failed: stderr and the exit code say why. Keys may grow, not
change.
"""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import click

from reshard.progress import Progress


class EventStream:
    """Writes events to stdout, or nowhere when nobody asked for them."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._failure: OSError | None = None

    def show_progress(self, total_bytes: int, *, label: str, quiet: bool) -> Progress:
        """A progress bar, or its events here, or both where they do not share a terminal."""
        if not self.enabled:
            return Progress(total_bytes, label=label, quiet=quiet)
        shares_terminal = sys.stdout is not None and sys.stdout.isatty()
        return Progress(total_bytes, label=label, quiet=quiet or shares_terminal, events=self.write)

    def begin(self, **values: Any) -> None:
        """Write the first line, for a command that shows its progress in several passes."""
        if self.enabled:
            self.write({"event": "begin", **values})

    def write(self, event: Mapping[str, Any]) -> None:
        """Write one line. A reader that went away, or a full disk, does not end the work: `end` tells of it."""
        if self._failure is None:
            try:
                click.echo(json.dumps(event, ensure_ascii=True, allow_nan=False))
            except OSError as error:
                self._failure = error
                _discard_stdout()

    def end(self, result: Mapping[str, Any]) -> None:
        """Write the last line.

        Raises:
            OSError: This or an earlier line could not be written.
        """
        self.write({"event": "end", **result})
        if self._failure is not None:
            raise self._failure


def _discard_stdout() -> None:
    """What could not be written is still held, and Python would complain of it once more at exit."""
    with suppress(OSError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
