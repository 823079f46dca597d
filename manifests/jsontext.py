"""Strict JSON: what a format that is read by many programs must not leave to chance is refused.

Knows bytes and JSON; knows nothing of headers or manifests.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from manifests.errors import ManifestError
from manifests.readable import open_regular

_NEGATIVE_ZERO = re.compile(r"-0(?![0-9.eE])")


def parse_json(raw: bytes, *, what: str) -> Any:
    """Parse UTF-8 JSON, refusing what readers disagree about or what only an attacker writes.

    Refused: bytes that are not UTF-8, duplicate keys (last-wins and first-wins readers would see different
    documents), NaN and Infinity (also spelled 1e999), the number -0, numbers of thousands of digits, nesting beyond
    Python's stack, lone surrogates.

    Args:
        raw: The document's bytes.
        what: Its name for the error message, such as ``header of model-00001-of-000163.safetensors``.

    Raises:
        ManifestError: The document is not strict JSON.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{what}: not UTF-8 at byte {error.start}; the file is damaged or not JSON") from error
    try:
        document = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_float=_finite_float,
            # A call for each number: only where the text has what it looks for.
            parse_int=_positive_zero if _NEGATIVE_ZERO.search(text) else None,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise ManifestError(f"{what}: JSON nested too deeply to be a real document") from error
    except ValueError as error:
        raise ManifestError(f"{what}: not valid JSON: {error}") from error
    # An escape such as \ud800 alone decodes to text that no file can hold; a raw one fails above already.
    if "\\u" in text:
        _refuse_surrogates(document, what)
    return document


def read_json(path: Path, *, max_bytes: int) -> Any:
    """Read and parse a small JSON file.

    Raises:
        SourceNotFoundError, ToolkitError: See `open_regular`.
        ManifestError: It is larger than max_bytes, or not strict JSON.
    """
    with open_regular(path) as file:
        raw = file.read(0, max_bytes + 1)
    if len(raw) > max_bytes:
        raise ManifestError(f"{path}: larger than {max_bytes} bytes, which no such document needs")
    return parse_json(raw, what=str(path))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:100]!r} appears twice")
            seen.add(key)
    return result


def _finite_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is beyond every float")
    return number


def _positive_zero(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is a whole number to some readers and none to others")
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_surrogates(document: Any, what: str) -> None:
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value)
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ManifestError(f"{what}: a string holds half of a surrogate pair") from error
