"""A program that moves files from one folder to another and survives everything, and its spoiled twins.

Each twin lacks one thing that is easily forgotten. A harness that cannot tell them apart proves nothing.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from os import pwrite as unseen_pwrite
from pathlib import Path

from harness.scenarios import Scenario

from manifests.paths import MANIFEST_NAME

BLOCK = 9000

SPOILED = {
    "no-fsync": "power",
    "no-folder-fsync": "power",
    "no-name-of-the-folder": "power",
    "unlink-first": "kill",
    "not-atomic": "kill",
    "ignores-short-writes": "short",
    "ignores-short-reads": "short",
    "ignores-errors": "fail",
    "shows-a-traceback": "fail",
    "fsyncs-again": "fail",
    "leaves-things": "kill",
    "past-the-layer": "steps",
}
"""Twin -> the kind of fault that shows what is wrong with it; "steps" for one that no run survives."""


class Toy:
    """A program with the face of ours."""

    def main(self, arguments: Sequence[str], prog_name: str) -> None:
        """Move the shards; arguments are the name of a twin or ``right``, and two folders."""
        try:
            self._move(arguments[0], Path(arguments[1]), Path(arguments[2]))
        except OSError as error:
            if arguments[0] == "shows-a-traceback":
                raise
            sys.stderr.write(f"reshard: {error}\n")
            sys.exit(15 if error.errno == errno.ENOSPC else 1)
        sys.exit(0)

    def _move(self, twin: str, source: Path, target: Path) -> None:
        target.mkdir(exist_ok=True)
        if twin != "no-name-of-the-folder":
            self._sync(twin, target.parent)
        for shard in sorted(source.glob("*.safetensors")):
            done = target / shard.name
            if not done.exists():
                part = done if twin == "not-atomic" else done.with_name(f"{shard.name}.partial")
                if twin == "leaves-things" and part.exists():
                    part = part.with_name(part.name + "~")
                content = self._read(twin, shard)
                if twin == "unlink-first":
                    os.unlink(shard)
                self._write(twin, part, content)
                os.rename(part, done)
            # What an earlier run has renamed may not be durable yet.
            if twin != "no-folder-fsync":
                self._sync(twin, target)
            if twin != "unlink-first":
                os.unlink(shard)
        self._sync(twin, source)
        self._write(twin, target / MANIFEST_NAME, b"{}")
        self._sync(twin, target)

    def _read(self, twin: str, path: Path) -> bytes:
        content = b""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while block := os.pread(descriptor, BLOCK, len(content)):
                content += block
                if twin == "ignores-short-reads" and len(block) < BLOCK:
                    break
        finally:
            os.close(descriptor)
        return content

    def _write(self, twin: str, path: Path, content: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            at = 0
            while at < len(content):
                block = content[at : at + BLOCK]
                try:
                    count = (unseen_pwrite if twin == "past-the-layer" else os.pwrite)(descriptor, block, at)
                except OSError:
                    if twin != "ignores-errors":
                        raise
                    count = len(block)
                at += len(block) if twin == "ignores-short-writes" else count
            if twin != "no-fsync":
                self._fsync(twin, descriptor)
        finally:
            os.close(descriptor)

    def _sync(self, twin: str, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            self._fsync(twin, descriptor)
        finally:
            os.close(descriptor)

    def _fsync(self, twin: str, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError:
            if twin != "fsyncs-again":
                raise
            os.fsync(descriptor)


TOYS = {
    f"toy-{twin}": Scenario(name=f"toy-{twin}", command=("toy", twin, "src", "dst"), reader=None)
    for twin in ("right", *SPOILED)
}
