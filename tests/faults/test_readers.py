"""Whoever opens what an interrupted command has left is told so, with the exit code for it: the runner too."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from harness.pool import Pool
from harness.tasks import require

from manifests.cli import manifests
from manifests.console import Group
from manifests.paths import JOURNAL_NAME, MANIFEST_NAME
from reshard.cli import reshard
from runner.cli import runner

RESUMABLE = 3


@pytest.fixture(scope="module")
def half(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    require(pool.ask({"do": "half", "scenario": "run", "folder": str(folder)}))
    assert (folder / "dst" / JOURNAL_NAME).exists()
    assert not (folder / "dst" / MANIFEST_NAME).exists()
    return folder / "dst"


@pytest.mark.parametrize(
    ("program", "command"),
    [
        (manifests, ("show", "DST")),
        (manifests, ("ls", "DST")),
        (manifests, ("check", "DST")),
        (reshard, ("plan", "DST")),
        (reshard, ("verify", "DST")),
        (reshard, ("restore", "DST", "--check")),
        (runner, ("doctor", "-m", "DST")),
        (runner, ("generate", "-m", "DST", "-p", "a")),
        (runner, ("logits", "-m", "DST", "--ids", "1")),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else " ".join(value),
)
def test_a_half_made_destination_is_refused_by_every_reader(
    half: Path, program: Group, command: tuple[str, ...]
) -> None:
    result = CliRunner().invoke(program, [str(half) if word == "DST" else word for word in command])
    assert result.exit_code == RESUMABLE, result.output
    assert "is not finished; the same `reshard` command that began it goes on with it" in result.output
    assert "Traceback" not in result.output
