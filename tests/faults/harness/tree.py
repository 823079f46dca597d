"""Whole folders as values: read, compared, and put into the state that a power cut leaves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from harness.model import Model, Node, Wanted

PAGE = 4096

Tree = dict[str, "bytes | None"]
"""Relative path -> bytes of a file, None for a folder."""


def read_tree(root: Path) -> Tree:
    """Everything below root."""
    found: Tree = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            assert not path.is_symlink(), path
            found[path.relative_to(root).as_posix()] = None if path.is_dir() else path.read_bytes()
    return dict(sorted(found.items()))


def write_sparse(path: Path, content: bytes) -> None:
    """Write a file with holes where it has whole pages of zeros."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for begin in range(0, len(content), PAGE):
            page = content[begin : begin + PAGE]
            if any(page):
                file.seek(begin)
                file.write(page)


def below(tree: Mapping[str, bytes | None], folder: str) -> Tree:
    """A folder of a tree."""
    return {path.removeprefix(f"{folder}/"): what for path, what in tree.items() if path.startswith(f"{folder}/")}


def difference(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """How one tree differs from another, in one line; empty when it does not. Untouched files are not compared."""
    parts = [f"missing {path}" for path in wanted.keys() - found.keys()]
    parts += [f"left over {path}" for path in found.keys() - wanted.keys()]
    for path in wanted.keys() & found.keys():
        a, b = found[path], wanted[path]
        if a != b and not isinstance(a, Node) and not isinstance(b, Node):
            parts.append(f"other bytes in {path}{_where(a, b)}")
    parts.sort()
    return "; ".join(parts[:6]) + (f"; and {len(parts) - 6} more" if len(parts) > 6 else "")


def _where(a: object, b: object) -> str:
    if not isinstance(a, bytes) or not isinstance(b, bytes):
        return ""
    if len(a) != len(b):
        return f" ({len(a)} bytes, not {len(b)})"
    return f" (at {next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)})"


def after_crash(root: Path, graveyard: Path, model: Model, wanted: Wanted) -> None:
    """Put a tree into the state after a crash. Untouched files stay or come back as they are, times and all."""
    moved: dict[str, str] = {}
    for node, place in model.places().items():
        origin = graveyard / place[1:] if place.startswith("#") else root / place
        paths = [path for path, what in wanted.items() if what is node]
        if paths and paths[0] != place:
            safe = graveyard / f"saved-{len(moved)}"
            os.rename(origin, safe)
            moved[paths[0]] = str(safe)
    for path in sorted(read_names(root), reverse=True):
        what = wanted.get(path, b"")
        if path not in wanted or (what is None) != (root / path).is_dir():
            _remove(root / path)
    for path, what in sorted(wanted.items()):
        if what is None:
            (root / path).mkdir(exist_ok=True)
        elif isinstance(what, bytes):
            (root / path).write_bytes(what)
        elif path in moved:
            os.rename(moved[path], root / path)


def read_names(root: Path) -> list[str]:
    """All paths below root."""
    return [
        Path(folder, name).relative_to(root).as_posix()
        for folder, folders, files in os.walk(root)
        for name in folders + files
    ]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
