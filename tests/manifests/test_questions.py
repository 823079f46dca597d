"""Many questions at the same time: answers in order, on as many threads as there may be."""

from __future__ import annotations

import threading
import time

import pytest

from manifests.errors import ResourceError
from manifests.questions import each


def test_answers_come_in_order() -> None:
    def ask(number: int) -> int:
        time.sleep((7 - number) / 100)
        return number * 2

    assert list(each(ask, range(7), at_once=3)) == [number * 2 for number in range(7)]
    assert list(each(ask, [], at_once=3)) == []


def test_a_failure_comes_when_its_turn_has_come() -> None:
    def ask(number: int) -> int:
        if number == 2:
            raise KeyError("two")
        return number

    answers = each(ask, range(5), at_once=5)
    assert (next(answers), next(answers)) == (0, 1)
    with pytest.raises(KeyError, match="two"):
        next(answers)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_few_threads_are_enough(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    real, left = threading.Thread.start, [allowed]

    def start(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    answers = each(lambda number: number, range(9), at_once=4)
    if allowed:
        assert list(answers) == list(range(9))
    else:
        with pytest.raises(ResourceError, match="allows no more threads"):
            next(answers)
