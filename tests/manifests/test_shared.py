"""Equal values become one object, and stay what they are."""

from __future__ import annotations

from manifests.shared import Shared


def test_the_first_of_equal_values_stands_for_all() -> None:
    shared = Shared()
    values = [(7168, 2048), 10**12, "F8_E4M3 and more"]
    copies = [(*range(7168, 7169), 2048), int("1" + "0" * 12), "".join(["F8_E4M3", " and more"])]
    for value, copy in zip(values, copies, strict=True):
        assert value is not copy
        assert shared[value] is value
        assert shared[copy] is value
    assert list(shared) == values
