"""Small documents of the cache, each with a digest of itself: what a crash, a disk or a hand changed is no note.

This file knows JSON; it must not know what is noted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.digest import sha256_hex


def encode(note: Mapping[str, Any]) -> bytes:
    """The bytes of a note's file."""
    return json.dumps({"note": note, "sha256": sha256_hex(_plain(note))}).encode("ascii")


def read(path: Path) -> dict[str, Any]:
    """What was noted in a file; empty where there is none, or it is not as it was written."""
    try:
        found = json.loads(path.read_bytes())
        note, digest = found["note"], found["sha256"]
        is_right = isinstance(note, dict) and digest == sha256_hex(_plain(note))
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return {}
    return dict(note) if is_right else {}


def _plain(note: Mapping[str, Any]) -> bytes:
    return json.dumps(note, sort_keys=True).encode("ascii")
