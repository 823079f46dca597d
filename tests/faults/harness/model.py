"""What a disk would hold after a power cut: for every file and folder the state now and the state at its last fsync.

A file keeps the bytes of its last fsync and the writes since; a folder the names of its last fsync; creating, renaming
and removing wait in one list, each atomic, until a folder that they touch is fsynced. That is all that POSIX promises
and less than most file systems keep, and it is what the product is held to. `crash` then chooses what of the waiting
things came through. Knows nothing of the product, nor of how it is called.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

SECTOR = 512
"""A disk writes a sector whole or not at all."""

VARIANTS = ("lost", "names", "zeros", "removals", "data")
"""The crashes without chance. `mix:SEED` keeps a random part of the sectors and names.

lost: all that was not fsynced is gone.
names: new names, renames and removals came through, bytes did not: files are empty or old.
zeros: names and sizes came through, bytes did not: files are full of zeros.
removals: what was removed is gone, all else as in `lost`: another disk, or another order.
data: bytes came through, names did not.
"""


@dataclass(eq=False, slots=True)
class Node:
    """A file or a folder.

    Attributes:
        folder: Whether it is a folder.
        found: An untouched file from before the model: its bytes are on the disk and nowhere else.
        now, durable: A file's bytes.
        waiting: Its writes since the last fsync, as (offset, bytes), or (size, None) for a change of size.
        names, durable_names: A folder's entries.
    """

    folder: bool = False
    found: bool = False
    now: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    waiting: list[tuple[int, bytes | None]] = field(default_factory=list)
    names: dict[str, Node] = field(default_factory=dict)
    durable_names: dict[str, Node] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Change:
    """A change of names, atomic: those that go and those that come, each in its folder."""

    gone: list[tuple[Node, str]]
    new: list[tuple[Node, str, Node]]

    def touches(self, folder: Node) -> bool:
        return any(entry[0] is folder for entry in (*self.gone, *self.new))

    def apply(self, names: Callable[[Node], dict[str, Node]]) -> None:
        for folder, name in self.gone:
            names(folder).pop(name, None)
        for folder, name, node in self.new:
            names(folder)[name] = node


Wanted = dict[str, "bytes | Node | None"]
"""Relative path -> a file's bytes, the node of an untouched file, None for a folder."""


class Model:
    """A tree of nodes that is told of every change, and what of it is durable."""

    def __init__(self, root: str) -> None:
        """All that is found below root is durable."""
        self.root = Node(folder=True)
        self.changes: list[Change] = []
        self.removed: dict[int, Node] = {}  # number in the graveyard -> untouched file that was unlinked
        self._scan(root, self.root)

    def _scan(self, path: str, node: Node) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                assert not entry.is_symlink(), entry.path
                child = Node(folder=entry.is_dir(), found=entry.is_file())
                node.names[entry.name] = node.durable_names[entry.name] = child
                if child.folder:
                    self._scan(entry.path, child)

    def find(self, relative: str) -> Node | None:
        """The node at a path, which is "" for the root."""
        node: Node | None = self.root
        for part in filter(None, relative.split("/")):
            if node is None:
                return None
            node = node.names.get(part)
        return node

    def _parent(self, relative: str) -> tuple[Node, str]:
        folder, _, name = relative.rpartition("/")
        parent = self.find(folder)
        assert parent is not None, relative
        return parent, name

    def create(self, relative: str, *, folder: bool = False) -> Node:
        """A new, empty file or folder."""
        parent, name = self._parent(relative)
        assert name not in parent.names, relative
        node = Node(folder=folder)
        self._change(Change([], [(parent, name, node)]))
        return node

    def link(self, relative: str, node: Node) -> None:
        """Another name for a file."""
        parent, name = self._parent(relative)
        self._change(Change([], [(parent, name, node)]))

    def remove(self, relative: str) -> None:
        """Take a name away."""
        self._change(Change([self._parent(relative)], []))

    def rename(self, relative: str, target: str) -> None:
        """Move a name, over another one if need be."""
        parent, name = self._parent(relative)
        self._change(Change([(parent, name)], [(*self._parent(target), parent.names[name])]))

    def _change(self, change: Change) -> None:
        change.apply(lambda folder: folder.names)
        self.changes.append(change)

    def load(self, node: Node, content: bytes) -> None:
        """Take over a file from before the model, because it is about to be written."""
        node.found = False
        node.now[:] = node.durable[:] = content

    def write(self, node: Node, offset: int, data: bytes) -> None:
        """Bytes that reached the system."""
        node.waiting.append((offset, data))
        _write(node.now, offset, data)

    def resize(self, node: Node, size: int) -> None:
        """Cut or grow a file."""
        node.waiting.append((size, None))
        _resize(node.now, size)

    def sync(self, node: Node) -> None:
        """An fsync that succeeded."""
        if node.folder:
            for change in [change for change in self.changes if change.touches(node)]:
                change.apply(lambda folder: folder.durable_names)
                self.changes.remove(change)
            return
        for offset, data in node.waiting:
            if data is None:
                _resize(node.durable, offset)
            else:
                _write(node.durable, offset, data)
        node.waiting.clear()

    def sync_failed(self, node: Node) -> None:
        """An fsync that failed: the kernel calls the pages clean, and no later fsync will write them."""
        node.waiting.clear()

    def places(self) -> dict[Node, str]:
        """Where the untouched files are, those removed as ``#number`` of the graveyard."""
        removed = {node: f"#{number}" for number, node in self.removed.items()}
        return removed | {found: path for path, found in self.state().items() if isinstance(found, Node)}

    def state(self) -> Wanted:
        """What the tree is now, as the processes see it."""
        return dict(_walk(self.root, lambda node: node.names, lambda node: bytes(node.now)))

    def crash(self, variant: str) -> Wanted:
        """What the tree is when the machine comes back. See `VARIANTS`."""
        kind, _, seed = variant.partition(":")
        chance = random.Random(seed)
        names: dict[Node, dict[str, Node]] = {}

        def names_of(folder: Node) -> dict[str, Node]:
            return names.setdefault(folder, dict(folder.durable_names))

        for change in self.changes:
            if (
                kind in ("names", "zeros")
                or (kind == "removals" and not change.new)
                or (kind == "mix" and chance.random() < 0.5)
            ):
                change.apply(names_of)
        return dict(_walk(self.root, names_of, lambda node: _crashed_bytes(node, kind, chance)))


def _walk(
    root: Node, names: Callable[[Node], dict[str, Node]], content: Callable[[Node], bytes], path: str = ""
) -> Iterator[tuple[str, bytes | Node | None]]:
    for name, node in sorted(names(root).items()):
        if node.folder:
            yield f"{path}{name}", None
            yield from _walk(node, names, content, f"{path}{name}/")
        else:
            yield f"{path}{name}", node if node.found else content(node)


def _crashed_bytes(node: Node, kind: str, chance: random.Random) -> bytes:
    if kind == "data":
        return bytes(node.now)
    found = bytearray(node.durable)
    if kind == "zeros":
        _resize(found, len(node.now))
    if kind == "mix":
        for offset, data in node.waiting:
            if data is None:
                if chance.random() < 0.5:
                    _resize(found, offset)
                continue
            for begin, end in _sectors(offset, len(data)):
                if chance.random() < 0.5:
                    _write(found, begin, data[begin - offset : end - offset])
    return bytes(found)


def _sectors(offset: int, size: int) -> Iterator[tuple[int, int]]:
    begin, stop = offset, offset + size
    while begin < stop:
        end = min(begin - begin % SECTOR + SECTOR, stop)
        yield begin, end
        begin = end


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if not data:
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))
