"""``python -m runner``."""

from runner.cli import runner

runner()
