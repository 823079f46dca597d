"""Typed reads from config.json: right type, right sign, sane size, or a sentence that names the key.

This file must not know which keys a model has.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from manifests.errors import ManifestError, Problem, UnsupportedModelError

LARGEST = 2**31 - 1
"""No size in any config comes near it; above, products of sizes would leave 64 bits."""


class Keys:
    """Typed reads from one JSON object; every failure names the key."""

    def __init__(self, values: object, inside: str) -> None:
        if not isinstance(values, Mapping):
            where = f"{inside} in config.json" if inside else "config.json"
            raise ManifestError(f"{where} must be a JSON object, not {type(values).__name__}")
        self._values: Mapping[str, Any] = values
        self._inside = inside

    def _loc(self, key: str) -> str:
        return f"{self._inside}.{key}" if self._inside else key

    def given(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def need(self, *names: str) -> None:
        """Refuse an object that lacks any of these keys; null counts as there."""
        missing = [self._loc(key) for key in names if key not in self._values]
        if missing:
            problems = [Problem(loc=loc, kind="missing_key", message=f"{loc} is needed") for loc in missing]
            raise ManifestError(f"config.json lacks {', '.join(missing)}; the runner does not guess it", problems)

    def fixed(self, key: str, only: object) -> None:
        """Refuse any value of key but the one that is implemented; absent and null are fine."""
        value = self._values.get(key)
        if value is None:
            return
        if type(value) is not type(only):
            self._wrong(key, value, f"must be {only!r}")
        if value != only:
            raise UnsupportedModelError(
                f"config.json has {self._loc(key)} {show(value)}; the runner implements {only!r} only"
            )

    def integer(self, key: str, *, least: int = 1, otherwise: int | None = None) -> int:
        """Read an integer of at least ``least``; absent and null mean ``otherwise``, if there is one."""
        if otherwise is not None and not self.given(key):
            return otherwise
        self.need(key)
        value = self._values[key]
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(key, value, "must be an integer")
        if not least <= value <= LARGEST:
            self._wrong(key, value, f"must lie between {least} and {LARGEST}")
        return value

    def number(self, key: str, *, least: float | None = None, otherwise: float | None = None) -> float:
        """Read a finite number: positive, or of at least ``least``; absent and null mean ``otherwise``."""
        if otherwise is not None and not self.given(key):
            return otherwise
        self.need(key)
        value = self._values[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._wrong(key, value, "must be a number")
        if not abs(value) <= LARGEST:  # NaN is not; neither is an integer that no float holds
            self._wrong(key, value, f"must be no larger than {LARGEST}")
        if value < least if least is not None else value <= 0:
            self._wrong(key, value, f"must be {least} or more" if least is not None else "must be positive")
        return float(value)

    def boolean(self, key: str) -> bool:
        """Read true or false."""
        self.need(key)
        value = self._values[key]
        if not isinstance(value, bool):
            self._wrong(key, value, "must be true or false")
        return value

    def text(self, key: str) -> str:
        """Read a string."""
        self.need(key)
        value = self._values[key]
        if not isinstance(value, str):
            self._wrong(key, value, "must be a string")
        return value

    def _wrong(self, key: str, value: object, must: str) -> NoReturn:
        loc = self._loc(key)
        raise ManifestError(
            f"config.json has {loc} {show(value)}; it {must}",
            [Problem(loc=loc, kind="invalid_value", message=f"{loc} {must}")],
        )


def show(value: object) -> str:
    """Give a value for a message: escaped, so that it cannot drive the terminal, and cut when it is long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def inconsistent(key: str, why: str) -> NoReturn:
    """Refuse a value that contradicts another one, naming its key.

    Raises:
        ManifestError: Always.
    """
    message = f"{key} {why}"
    raise ManifestError(f"config.json: {message}", [Problem(loc=key, kind="inconsistent", message=message)])
