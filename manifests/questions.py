"""Many questions at the same time, their answers in order.

On threads that nobody waits for: a server may be silent for a minute when the program is to end.
"""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from manifests.errors import ResourceError

S = TypeVar("S")
T = TypeVar("T")

Watch = Callable[[int, int], None]
"""Is told how many of how many there are."""


def each(ask: Callable[[S], T], names: Sequence[S], *, at_once: int) -> Generator[T, None, None]:
    """The answer for each of these, in their order.

    Args:
        ask: Gives it; called on several threads.
        names: What is asked about.
        at_once: How many answers may be under way.

    Raises:
        ResourceError: The system allows not one more thread.
        Whatever `ask` raises, when that answer's turn has come.
    """
    waiting: queue.SimpleQueue[tuple[S, Future[T]]] = queue.SimpleQueue()
    answers: list[Future[T]] = [Future() for _ in names]
    for pair in zip(names, answers, strict=True):
        waiting.put(pair)
    is_over = threading.Event()

    def work() -> None:
        with suppress(queue.Empty):
            while not is_over.is_set():
                name, answer = waiting.get_nowait()
                try:
                    answer.set_result(ask(name))
                except BaseException as error:
                    answer.set_exception(error)

    try:
        for number in range(min(at_once, len(names))):
            try:
                threading.Thread(target=work, daemon=True).start()
            except RuntimeError as error:
                if number == 0:
                    raise ResourceError("the system allows no more threads; allow more (ulimit -u)") from error
                break  # those that there are will do
        for answer in answers:
            yield answer.result()
    finally:
        is_over.set()
