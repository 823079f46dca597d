"""How long web servers are waited for: how often a failure is borne, how long the pauses are, who is told of them.

This file knows failures and clocks; it asks no server.
"""

import logging
import random
import threading
import time

from manifests import urls
from manifests.answers import PassingError
from manifests.errors import RemoteError

TRIES = 6
"""Failures one behind the other, without a byte between them, that are borne."""

FIRST_TRIES = 3
"""The same for a server that has never answered: its name is likely to be wrong."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 300.0
"""A server that asks for more is not waited for."""

TOLD_PAUSE_S = 3.0
"""Whoever waits for longer is told why."""

_logger = logging.getLogger(__name__)


class Servers:
    """Which servers have ever answered, and what was told of them. Any number of threads may use one."""

    def __init__(self) -> None:
        self._answered: set[tuple[str, str, int]] = set()
        self._told_until = 0.0
        self._lock = threading.Lock()

    def answered(self, url: str) -> None:
        """The server of an address said something, whatever it was."""
        self._answered.add(urls.origin(url))

    def has_answered(self, url: str) -> bool:
        """Whether it ever did."""
        return urls.origin(url) in self._answered

    def tell(self, url: str, failure: PassingError, pause_s: float) -> None:
        """Say once for all who wait that a server is asked again later, if that is long enough to wonder."""
        if pause_s + failure.waited_s < TOLD_PAUSE_S:
            return
        with self._lock:
            now = time.monotonic()
            if now < self._told_until:
                return
            self._told_until = now + max(pause_s, TOLD_PAUSE_S)
        _logger.warning("%s: %s; it is asked again in %.0f s", urls.shown(url), failure, pause_s)


class Patience:
    """How many failures one thing has had, one behind the other.

    Args:
        servers: Who has answered.
        url: Who is asked.
        tries: Failures that are borne, where it is another number than for all.
    """

    def __init__(self, servers: Servers, url: str, tries: int | None = None) -> None:
        self._servers = servers
        self._url = url
        self._tries = tries
        self._failures = 0

    def forget(self) -> None:
        """It went on."""
        self._failures = 0

    def bear(self, failure: PassingError) -> None:
        """Wait before the next try.

        Raises:
            RemoteError: There were too many, or the server asks for too long a pause.
        """
        where, has_answered = urls.shown(self._url), self._servers.has_answered(self._url)
        self._failures += 1
        if self._failures >= (self._tries or (TRIES if has_answered else FIRST_TRIES)):
            advice = "" if has_answered else "look at the address, or "
            raise RemoteError(
                f"{where}: {failure}, {self._failures} times in a row; {advice}run again later"
            ) from failure
        if failure.pause_s == 0:
            return
        asked_s = failure.pause_s or 0.0
        if asked_s > LONGEST_PAUSE_S:
            raise RemoteError(f"{where}: {failure}, and asks to wait {asked_s:.0f} s; run again then") from failure
        # Not all clients of a server that came back should ask it at once.
        pause_s = max(asked_s, FIRST_PAUSE_S * 2 ** (self._failures - 1) * random.uniform(0.75, 1.25))
        self._servers.tell(self._url, failure, pause_s)
        time.sleep(pause_s)
