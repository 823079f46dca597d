"""What is put to the test: commands, the folders that they start from, and what they must end in.

A scenario's end is what an undisturbed run of it ends in. It is made once, by the same program with the same settings,
and proven by other means: see `test_scenarios.py`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import child
from harness.child import Ended
from harness.faults import Fault
from harness.model import Model
from harness.source import build, build_gguf
from harness.tree import Tree, difference, read_tree, write_sparse

Command = tuple[str, ...]
"""Program and arguments; src, dst and out stand for the folders of these names."""

FOLDERS = ("src", "dst", "out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One command under test.

    Attributes:
        name: For people and texts.
        command: What is disturbed.
        before: Commands that make the folders it starts from, out of a source.
        change: What is then done to the folders by hand.
        intact: Folders that may not change at any time.
        failed_codes: Exit codes that a failing disk may lead to besides its own.
        done_codes: Exit codes of the same command when all is done already and nothing is left to say so.
        reader: What a reader is asked to open while the command is under way; None when there is no such folder.
        direct: Whether O_DIRECT can be had.
        sizes: Of the source, see `source.build`.
        gguf: Whether the source is GGUF files.
    """

    name: str
    command: Command
    before: tuple[Command, ...] = ()
    change: Callable[[Path], None] | None = None
    intact: tuple[str, ...] = ()
    failed_codes: tuple[int, ...] = ()
    done_codes: tuple[int, ...] = (0,)
    reader: str | None = "dst"
    direct: bool = True
    sizes: dict[str, int] = field(default_factory=dict)
    gguf: bool = False


def _remove_source(root: Path) -> None:
    shutil.rmtree(root / "src")


def _damage(root: Path) -> None:
    """A flipped bit in a payload and in a header, a short file, a lost one, a document with other bytes."""
    experts = sorted((root / "dst/layers").glob("*/experts/*.safetensors"))
    for path, offset in ((experts[0], -1), (experts[1], 20), (root / "dst/tokenizer.json", 3)):
        content = bytearray(path.read_bytes())
        content[offset] ^= 16
        path.write_bytes(content)
    os.truncate(experts[2], 5000)
    experts[3].unlink()


RUN: Command = ("reshard", "run", "src", "dst", "-q")
RESTORE: Command = ("reshard", "restore", "dst", "out", "-q")
CONSUME = ("--consume", "--yes")
SERIAL, THREADS = ("--jobs", "1"), ("--jobs", "3")
LARGE = {"layers": 6, "experts": 12}

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="run", command=(*RUN, *SERIAL), intact=("src",)),
        Scenario(name="run-threads", command=(*RUN, *THREADS), intact=("src",)),
        Scenario(name="run-buffered", command=(*RUN, *SERIAL), intact=("src",), direct=False),
        Scenario(name="run-zstd", command=(*RUN, "--codec", "zstd"), intact=("src",)),
        Scenario(name="widen", command=RUN, before=((*RUN, "--layers", "1", "--experts", "0,2"),), intact=("src",)),
        Scenario(name="consume", command=(*RUN, *CONSUME, *SERIAL)),
        Scenario(name="consume-threads", command=(*RUN, *CONSUME, *THREADS)),
        Scenario(
            name="restore",
            command=(*RESTORE, *SERIAL),
            before=(RUN,),
            change=_remove_source,
            intact=("dst",),
            reader="out",
            done_codes=(0, 1),
        ),
        *(
            Scenario(name=name, command=command, before=(RUN,), change=_remove_source, done_codes=(0, 10), sizes=sizes)
            for name, command, sizes in (
                ("restore-consume", (*RESTORE, *CONSUME, *SERIAL), {}),
                ("restore-consume-threads", (*RESTORE, *CONSUME, *THREADS), {}),
                ("restore-consume-large", (*RESTORE, *CONSUME), LARGE),
            )
        ),
        Scenario(
            name="repair",
            command=("reshard", "repair", "dst", "--from", "src", "-q"),
            failed_codes=(13,),  # it goes on with the other files, and ends with: something is damaged still
            before=(RUN,),
            change=_damage,
            intact=("src",),
            reader=None,
        ),
        Scenario(
            name="unpack", command=("reshard", "unpack", "dst", "-q"), before=((*RUN, "--codec", "zstd"),), reader=None
        ),
        Scenario(name="run-gguf", command=(*RUN, *SERIAL), intact=("src",), gguf=True),
        Scenario(name="consume-gguf", command=(*RUN, *CONSUME, *SERIAL), gguf=True),
        Scenario(
            name="restore-gguf",
            command=(*RESTORE, *CONSUME, *SERIAL),
            before=(RUN,),
            change=_remove_source,
            done_codes=(0, 10),
            gguf=True,
        ),
        Scenario(name="run-large", command=RUN, intact=("src",), sizes=LARGE),
        Scenario(name="consume-large", command=(*RUN, *CONSUME), sizes=LARGE),
    )
}


class Stage:
    """A scenario that can be put up again and again, in a folder of its own."""

    def __init__(self, scenario: Scenario, work: Path) -> None:
        """Make the start and the end of the scenario.

        Raises:
            ValueError: A command failed without any fault.
        """
        self.scenario = scenario
        self.root, self.graveyard = work / "root", work / "graveyard"
        self.clear()
        if scenario.gguf:
            build_gguf(self.root / "src")
        else:
            build(self.root / "src", **scenario.sizes)
        self.source: Tree = read_tree(self.root / "src")
        for command in scenario.before:
            self._must(self.run(command, Model(str(self.root)), Fault()), command)
        if scenario.change is not None:
            scenario.change(self.root)
        self._times = {path: (self.root / path).stat().st_mtime_ns for path in read_tree(self.root)}
        self.start: Tree = read_tree(self.root)
        started = time.perf_counter()
        self.undisturbed = self.run(scenario.command, Model(str(self.root)), Fault())
        self.seconds = time.perf_counter() - started
        self._must(self.undisturbed, scenario.command)
        self.end: Tree = read_tree(self.root)

    def put_up(self) -> Model:
        """The start once more, and what the disk holds of it: all."""
        return self.put_up_as(self.start)

    def put_up_as(self, tree: Tree) -> Model:
        """Another state of the same folders."""
        self.clear()
        for path, content in tree.items():
            if content is None:
                (self.root / path).mkdir()
            else:
                write_sparse(self.root / path, content)
                if path in self._times:
                    os.utime(self.root / path, ns=(self._times[path],) * 2)
        return Model(str(self.root))

    def run(self, command: Sequence[str], model: Model, fault: Fault) -> Ended:
        """One command on this stage."""
        return child.run(
            self.resolve(command),
            self.root,
            self.graveyard,
            model,
            fault,
            direct=self.scenario.direct,
        )

    def resolve(self, command: Sequence[str]) -> list[str]:
        """A command with the folders' real names."""
        return [str(self.root / word) if word in FOLDERS else word for word in command]

    def changed(self) -> str:
        """How the folders that must stay intact differ from the start."""
        for folder in self.scenario.intact:
            found = {f"{folder}/{path}": what for path, what in read_tree(self.root / folder).items()}
            wanted = {path: what for path, what in self.start.items() if path.startswith(f"{folder}/")}
            if text := difference(found, wanted):
                return text
        return ""

    def clear(self) -> None:
        """Nothing is left on the disk but two empty folders."""
        for folder in (self.root, self.graveyard):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    @staticmethod
    def _must(ended: Ended, command: Sequence[str]) -> None:
        if ended.code != 0:
            raise ValueError(f"{' '.join(command)}: ends with {ended.code} on a good disk: {ended.err}{ended.out}")
