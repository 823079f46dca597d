"""What a web server may do wrong: for `instead` of `tests.file_server.FileServer`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from tests.file_server import Answer, Asked, Fault

DROP = Answer(0)
"""Nothing is sent, and the connection ends."""


def once(fault: Fault, times: int = 1) -> Fault:
    """A fault the first times that it has an answer; from then on what is right."""
    lock, left = threading.Lock(), times

    def instead(asked: Asked, right: Answer) -> Answer | None:
        nonlocal left
        with lock:
            answer = fault(asked, right) if left else None
            left -= answer is not None
        return answer

    return instead


def flip(name: str, at: int) -> Fault:
    """One bit of this byte of a file is wrong, whenever it is sent."""

    def instead(asked: Asked, right: Answer) -> Answer | None:
        begin, end = asked.span or (0, 0)
        if asked.name != name or not begin <= at < end:
            return None
        body = bytearray(right.body)
        body[at - begin] ^= 1
        return replace(right, body=bytes(body))

    return instead


def gone_after(times: int, counts: Callable[[Asked], bool]) -> Fault:
    """No more answers to anything, once it was asked more than so many times for what counts."""
    lock, left = threading.Lock(), times

    def instead(asked: Asked, right: Answer) -> Answer | None:
        nonlocal left
        with lock:
            left -= counts(asked)
            return DROP if left < 0 else None

    return instead
