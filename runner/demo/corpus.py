"""Which text the demo model is trained on, and which it must never see.

The corpus is the source of the running interpreter's own standard library: text that every machine with Python has,
modules, docstrings and the language reference that `pydoc` carries (`pydoc_data/topics.py`). Tests of the library
are left out, since many distributions do not ship them.

A module is held out when a hash of its path (relative to the library, with forward slashes) says so. The rule knows
nothing about the text, so the same modules are held out under every Python version and on every machine.

This file must not import torch: `python -m runner.demo.corpus --held-out` prints the held-out files, one a line.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click

HELD_OUT_PERCENT = 5

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def library_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(module_path: str) -> bool:
    """Whether the module at this path (relative to the library, forward slashes) is kept from training."""
    digest = hashlib.sha256(module_path.encode()).hexdigest()
    return int(digest, 16) % 100 < HELD_OUT_PERCENT


def files(root: Path | None = None, *, held_out: bool) -> Iterator[Path]:
    """Yield the corpus files of one side in a fixed order.

    Args:
        root: Library folder; the running interpreter's own by default.
        held_out: True for the files that training never sees, False for the training text.
    """
    root = root or library_root()
    for relative in sorted(_modules(root)):
        path = root / relative
        if is_held_out(relative) is held_out and _text(path):
            yield path


def texts(root: Path | None = None, *, held_out: bool) -> Iterator[str]:
    """Yield the text of `files` in the same order, line ends as Python reads them."""
    for path in files(root, held_out=held_out):
        yield _text(path)


def _modules(root: Path) -> Iterator[str]:
    """Yield the relative path of every module, in any order."""
    for folder, folders, names in os.walk(root):
        # Not entered at all: site-packages alone may hold a hundred times as many files as the library.
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        yield from (Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py"))


def _text(path: Path) -> str:
    """The file as text; empty when it is blank or not UTF-8 (some encoding samples are not)."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return text if text.strip() else ""


@click.command()
@click.option("--held-out", is_flag=True, help="The files that training never sees.")
def main(held_out: bool) -> None:
    """Print the paths of the training files, or of the held-out files."""
    for path in files(held_out=held_out):
        click.echo(path)


if __name__ == "__main__":
    main()
