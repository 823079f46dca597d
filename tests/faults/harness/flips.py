"""One flipped bit, in every region of a finished or half-finished destination: is it found, and is the file named?

A finished one is read by `verify`, and by `check` where form is concerned. A half-finished one is completed by the same
command with `--paranoid`: either all becomes right again, or the file is named. Without it, sizes are believed; then
`verify` must find afterwards what the command took over.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from harness import child
from harness.cases import no_sentence
from harness.faults import Fault, Kill
from harness.model import Model
from harness.orders import sample
from harness.scenarios import Stage
from harness.tree import Tree, difference, read_tree

from manifests.paths import ASIDE_NAME, JOURNAL_NAME, MANIFEST_NAME
from manifests.storage import TEMP_SUFFIX

DAMAGED, BAD = 13, 12
WHOLE = "whole"
HALF = ("0.45", "0.65", "0.85")
"""Where the half-finished ones were killed, as parts of all points."""


class Region(NamedTuple):
    """A place to flip: the file, the byte and the bit in it, and what is there."""

    path: str
    what: str
    offset: int
    bit: int

    @property
    def name(self) -> str:
        """What a message must hold: the path below the folder that a command was given, as it will be in the end."""
        return self.path.split("/", 1)[1].removesuffix(TEMP_SUFFIX)


def play(stage: Stage, state: str, part: int, parts: int, limit: int | None) -> tuple[int, list[str]]:
    """Flip one bit after the other in one state of the folders.

    Args:
        stage: The scenario.
        state: `WHOLE`, or one of `HALF`.
        part, parts: Which share of the regions to do.
        limit: At most so many.

    Returns:
        How many were flipped, and what was wrong with which.
    """
    tree = stage.end if state == WHOLE else _half(stage, float(state))
    regions = sorted(_regions(tree), key=lambda region: (region.what.split()[0], region.path, region.what))[part::parts]
    if limit is not None:
        regions = sample(regions, limit)
    judge = _judge_whole if state == WHOLE else _judge_half
    wrong = [f"{state} {region}: {text}" for region in regions if (text := judge(stage, tree, region))]
    return len(regions), wrong


def _judge_whole(stage: Stage, tree: Tree, region: Region) -> str:
    _flip(stage, tree, region)
    ended = child.look(["reshard", "verify", str(stage.root / "dst"), "-q"])
    if ended.code not in (BAD, DAMAGED) or region.name not in ended.out + ended.err:
        return f"verify ends with {ended.code}: {ended.out}{ended.err}"
    if region.what in ("length", "header", "padding", "manifest"):
        ended = child.look(["manifests", "check", str(stage.root / "dst")])
        # What is wrong inside a manifest is named by its place in it.
        is_named = region.name in ended.out + ended.err or region.what == "manifest"
        if ended.code not in (BAD, DAMAGED) or not is_named:
            return f"check ends with {ended.code}: {ended.out}{ended.err}"
    return ""


def _judge_half(stage: Stage, tree: Tree, region: Region) -> str:
    command = stage.scenario.command
    ended = stage.run((*command, "--paranoid"), _flip(stage, tree, region), Fault())
    if wrong := _wrong(stage, region, ended):
        return f"--paranoid {wrong}"
    if "out" in command:
        return ""
    ended = stage.run(command, _flip(stage, tree, region), Fault())
    if ended.code == 0 and difference(read_tree(stage.root), stage.end):
        ended = child.look(["reshard", "verify", str(stage.root / "dst"), "-q"])
        if ended.code not in (BAD, DAMAGED) or region.name not in ended.out:
            return f"not seen by the command, and verify ends with {ended.code}: {ended.out}{ended.err}"
        return ""
    return _wrong(stage, region, ended)


def _wrong(stage: Stage, region: Region, ended: child.Ended) -> str:
    """What is wrong with a command that met the flipped bit: it is right in the end, or names the file."""
    if ended.code:
        if "`reshard verify`" in ended.err and region.path.startswith("dst/"):
            ended = child.look(["reshard", "verify", str(stage.root / "dst"), "-q"])
            return "" if region.name in ended.out else f"sends to verify, which ends with {ended.code}: {ended.err}"
        said = ended.out + ended.err
        return no_sentence(ended) if region.name in said else f"ends with {ended.code}: {said.strip()}"
    found, wanted = read_tree(stage.root), dict(stage.end)
    if region.path.split("/")[0] in stage.scenario.intact:
        # What the command did not need stays as it was found.
        wanted[region.path] = found.get(region.path, b"")
    text = difference(found, wanted)
    return text and f"ends with 0: {text}"


def _flip(stage: Stage, tree: Tree, region: Region) -> Model:
    damaged = bytearray(tree[region.path] or b"")
    damaged[region.offset] ^= 1 << region.bit
    return stage.put_up_as({**tree, region.path: bytes(damaged)})


def _half(stage: Stage, share: float) -> Tree:
    """The tree after a kill on the way."""
    stage.run(stage.scenario.command, stage.put_up(), Kill(int(stage.undisturbed.points * share), "before"))
    return read_tree(stage.root)


def leave_half(stage: Stage, folder: Path) -> dict[str, str]:
    """Copy what an interrupted command leaves to another place, to be read by others."""
    _half(stage, float(HALF[-1]))
    shutil.copytree(stage.root, folder, dirs_exist_ok=True)
    return {"wrong": ""}


def _regions(tree: Tree) -> Iterator[Region]:
    for path, content in tree.items():
        if path.startswith("src/") or not content:
            continue
        for what, begin, end in _parts(path, content):
            chance = random.Random(f"{path} {what}")
            yield Region(path, what, chance.randrange(begin, end), chance.randrange(8))


def _parts(path: str, content: bytes) -> Iterator[tuple[str, int, int]]:
    """The regions of a file with their ranges, by what kind of file it is."""
    name = path.rpartition("/")[2]
    if ".safetensors" in name and not name.endswith((".json", ".zst")):
        length = min(int.from_bytes(content[:8], "little"), len(content) - 8)
        used = len(content[8 : 8 + length].rstrip(b" "))
        yield "length", 0, 8
        if used:
            yield "header", 8, 8 + used
        if used < length:
            yield "padding", 8 + used, 8 + length
        payload = len(content) - 8 - length
        if payload > 3:
            for part in range(3):
                begin = 8 + length + payload * part // 3
                yield f"payload {part + 1}/3", begin, begin + payload // 3
    elif name == JOURNAL_NAME:
        begin = 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            yield f"journal line {number}", begin, begin + len(line) - 1
            yield f"journal end of line {number}", begin + len(line) - 1, begin + len(line)
            begin += len(line)
    elif name in (MANIFEST_NAME, ASIDE_NAME):
        for part in range(20):
            yield "manifest", len(content) * part // 20, len(content) * (part + 1) // 20
    else:
        yield "document", 0, len(content)
