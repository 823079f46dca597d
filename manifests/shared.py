"""One object in place of many equal ones.

A checkpoint has a hundred thousand tensors and a few dozen dtypes, shapes, sizes and offsets. Kept once each, its
description takes two thirds of the memory.
"""

from typing import Any


class Shared(dict[Any, Any]):
    """``shared[value]`` is the first object given that equals value.

    For texts, whole numbers and tuples of them: of what equals each other across types, such as True and 1, one would
    pose as the other.
    """

    def __missing__(self, value: Any) -> Any:
        self[value] = value
        return value
