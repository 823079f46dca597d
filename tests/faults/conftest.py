"""The harness is a package of its own beside these tests, for the sweep and for the workers too; workers are shared."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness.pool import Pool  # found through the line above


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool(min(4, os.cpu_count() or 1)) as workers:
        yield workers
