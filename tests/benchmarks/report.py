"""What a benchmark says: a table for people on stderr, one JSON document as the last line of stdout."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

from measure import Measured

HEADING = f"{'':<34}{'seconds':>10}{'GB/s':>8}{'CPU s/GB':>10}{'peak MB':>9}"


def say(text: str) -> None:
    """One line for people."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def say_measured(label: str, measured: Measured, size: int) -> None:
    """A line of the table; the rate counts `size` bytes once, whatever was read or written for them."""
    figures = measured.over(size)
    say(
        f"{label:<34}{figures['seconds']:>10.2f}{figures['gb_per_s']:>8.3f}{figures['cpu_s_per_gb']:>10.2f}"
        f"{measured.peak_bytes / 1e6:>9.0f}"
    )


def finish(benchmark: str, result: Mapping[str, Any]) -> None:
    """The last line."""
    machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    document = {"benchmark": benchmark, "machine": machine, **result}
    sys.stdout.write(json.dumps(document, separators=(",", ":")) + "\n")
