"""Whether a reshard can start, and how long it will take: source, destination, file system, space, speed.

Every check is made even if an earlier one failed, as far as it can be; but nothing is tried in a destination that a run
would refuse. What is written is one temporary folder in the destination, or in the nearest folder above it that
exists, and it is removed again. This file must not print.
"""

import dataclasses
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from manifests.console import counted, format_bytes, format_seconds
from manifests.errors import ResourceError, ToolkitError
from manifests.schema import Selection
from reshard.consume import same_disk
from reshard.destination import check_apart, check_empty, free_bytes
from reshard.disk import measure_fsync_seconds, measure_hash_rate, measure_read_rate, measure_write_rate
from reshard.earlier import Earlier, find_earlier
from reshard.filesystem import (
    MEMORY_TYPES,
    NETWORK_TYPES,
    Abilities,
    existing_folder,
    free_inodes,
    reads_directly,
    trial_folder,
    try_abilities,
    try_renaming,
    type_of,
)
from reshard.forecast import estimate_reshard, hashing_cores, hole_bytes, largest_shard, open_files
from reshard.lock import lock_folder
from reshard.plan import Plan, make_plan
from reshard.remaining import Remaining, find_remaining, left_inodes, needed_room
from reshard.run import check_consume, consume_peak_bytes, needed_bytes
from reshard.source import SourceCheckpoint, read_source, source_root
from reshard.workers import STREAM_JOBS

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at, how it is, a sentence, and for a problem the exit code that the run would end with."""

    topic: str
    state: Literal["ok", "note", "problem"]
    message: str
    exit_code: int = 0


@dataclass(slots=True, kw_only=True)
class Facts:
    """What was found out; None where it could not be.

    Attributes:
        shards, tensors, payload_bytes: Of the source.
        files: Files with tensors that a run makes.
        state: What is in the destination, see `reshard.remaining`; None when a run would refuse it.
        kept_bytes: Payload that is there.
        write_bytes, write_files: Payload and files with tensors that are left to write.
        file_system: Type of the destination's.
        same_file_system: Whether the source is on it too.
        needed_bytes, free_bytes: Disk: what must be free for what is left, and what is.
        consume_peak_bytes: What ``--consume`` needs at the most beside the source; None when it would be refused.
        consume_needed_bytes: What must be free for it now.
        needed_inodes, free_inodes: Files and folders that are left to make, and that can be; free_inodes is None where
            they are not limited.
        abilities: What the destination's file system can do.
        read_bytes_per_s: Of the source.
        write_bytes_per_s, fsync_seconds: Of the destination.
        sha256_bytes_per_s: Of one core.
        cores: That hash.
        seconds: What a run takes.
        limited_by: ``the disk``, ``reading``, ``writing`` or ``hashing``.
    """

    shards: int | None = None
    tensors: int | None = None
    payload_bytes: int | None = None
    files: int | None = None
    state: str | None = None
    kept_bytes: int | None = None
    write_bytes: int | None = None
    write_files: int | None = None
    file_system: str | None = None
    same_file_system: bool | None = None
    needed_bytes: int | None = None
    free_bytes: int | None = None
    consume_peak_bytes: int | None = None
    consume_needed_bytes: int | None = None
    needed_inodes: int | None = None
    free_inodes: int | None = None
    abilities: Abilities | None = None
    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    fsync_seconds: float | None = None
    sha256_bytes_per_s: float | None = None
    cores: int | None = None
    seconds: float | None = None
    limited_by: str | None = None


@dataclass(slots=True, kw_only=True)
class Report:
    """Everything that was found out, the checks in their order."""

    source: Path
    destination: Path
    facts: Facts = field(default_factory=Facts)
    checks: list[Check] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 when a run can start, else that of the first problem."""
        return next((check.exit_code for check in self.checks if check.state == "problem"), 0)

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        return {
            "can_start": self.exit_code == 0,
            "exit_code": self.exit_code,
            "source": str(self.source),
            "destination": str(self.destination),
            "facts": dataclasses.asdict(self.facts),
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        for check in self.checks:
            state = "PROBLEM" if check.state == "problem" else check.state
            yield f"{state:<8} {check.topic:<12} {check.message}"
        yield f"can start: {'no' if self.exit_code else 'yes'}"


def examine(source: Path, destination: Path) -> Report:
    """Check whether `reshard run` can start from source into destination."""
    return _Examination(source, destination).examine()


class _Examination:
    """One look at one source and one destination."""

    def __init__(self, source: Path, destination: Path) -> None:
        self._source_path = source
        self._root = source_root(source) or source
        self._destination = destination
        self._report = Report(source=source, destination=destination)
        self._facts = self._report.facts
        self._earlier = Earlier()
        self._remaining = Remaining(state="new")

    def examine(self) -> Report:
        """All checks in order."""
        found = self._attempt("destination", lambda: find_earlier(self._root, self._destination))
        can_write = found is not None
        self._earlier = found or self._earlier
        planned = self._attempt("source", self._check_source)
        if can_write:
            can_write = self._attempt("destination", lambda: self._check_destination(planned)) is not None
        self._attempt("file system", self._check_file_system)
        if can_write:
            self._attempt("writing", self._check_writing)
        if planned is not None:
            source, plan = planned
            self._attempt("consume", lambda: self._check_consume(source, plan))
            self._attempt("space", lambda: self._check_space(source, plan))
            self._attempt("inodes", lambda: self._check_inodes(source, plan))
            self._check_open_files(plan)
            self._attempt("reading", lambda: self._check_reading(source))
            self._check_time(source)
        return self._report

    def _attempt(self, topic: str, check: Callable[[], T]) -> T | None:
        """Make a check; a known failure is a problem, and the others go on."""
        try:
            return check()
        except ToolkitError as error:
            self._add(topic, "problem", str(error), error.exit_code)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            self._add(topic, "problem", f"{where}{error.strerror}", ToolkitError.exit_code)
        return None

    def _add(self, topic: str, state: Literal["ok", "note", "problem"], message: str, exit_code: int = 0) -> None:
        self._report.checks.append(Check(topic=topic, state=state, message=message, exit_code=exit_code))

    def _check_source(self) -> tuple[SourceCheckpoint, Plan]:
        source = read_source(self._source_path, self._earlier.freed)
        plan = make_plan(source, Selection())
        facts = self._facts
        facts.shards, facts.payload_bytes, facts.files = len(source.shards), plan.payload_bytes, len(plan.files)
        facts.tensors = sum(len(file.tensors) for file in plan.files)
        shards, size = counted(facts.shards, "shard"), format_bytes(plan.payload_bytes)
        self._add("source", "ok", f"{self._source_path}: {shards}, {facts.tensors:,} tensors, {size}")
        # All of it, unless the destination is found to hold some.
        self._remaining = find_remaining(source, plan, Earlier(), None)
        return source, plan

    def _check_destination(self, planned: tuple[SourceCheckpoint, Plan] | None) -> bool:
        destination, earlier = self._destination, self._earlier
        check_apart(self._source_path, destination)
        is_new = not destination.exists()
        if not is_new:
            with lock_folder(destination):
                pass
        if earlier.journal is None and earlier.manifest is None:
            if not is_new:
                check_empty(destination)
            self._add("destination", "ok", f"{destination}: {'new' if is_new else 'empty'}")
        if planned is not None:
            self._remaining = find_remaining(*planned, earlier, destination)
            self._tell_remaining(self._remaining, planned[1])
        return True

    def _tell_remaining(self, remaining: Remaining, plan: Plan) -> None:
        facts = self._facts
        facts.state, facts.kept_bytes = remaining.state, remaining.kept_bytes
        facts.write_bytes, facts.write_files = remaining.write_bytes, remaining.write_files
        if remaining.state == "new":
            return
        size = f"{format_bytes(remaining.kept_bytes)} of {format_bytes(plan.payload_bytes)}"
        text = {
            "interrupted": f"an interrupted run, {size} done; the same command goes on with it",
            "part": f"has {size}; a run adds the rest",
            "complete": "complete already, nothing is left to do",
        }[remaining.state]
        self._add("destination", "note", f"{self._destination}: {text}")

    def _check_file_system(self) -> bool:
        folder = existing_folder(self._destination)
        facts = self._facts
        facts.file_system = type_of(folder)
        facts.same_file_system = same_disk(self._root, self._destination) if self._root.exists() else None
        name = facts.file_system or "of unknown type"
        where = {True: ", the source's too", False: ", the source is on another", None: ""}[facts.same_file_system]
        if facts.file_system in NETWORK_TYPES:
            self._add("file system", "note", f"{name}{where}; what is durable there is up to the server")
        elif facts.file_system in MEMORY_TYPES:
            self._add("file system", "note", f"{name}{where}; it is memory, and gone when the machine stops")
        else:
            self._add("file system", "ok", f"{name}{where}")
        return True

    def _check_writing(self) -> bool:
        """Everything that has to be written to be known."""
        parent = existing_folder(self._destination)
        with trial_folder(parent) as folder:
            try_renaming(folder)
            self._add("durability", "ok", "fsync and rename work, of files and folders")
            self._tell_abilities(try_abilities(folder))
            self._measure_writing(folder)
        return True

    def _tell_abilities(self, able: Abilities) -> None:
        self._facts.abilities = able
        is_direct = able.direct_write and able.direct_read
        for topic, works, yes, no in (
            ("O_DIRECT", is_direct, "files can be written and read past the page cache",
             "does not work here: files go through the page cache, which takes more processor time"),
            ("holes", able.sparse, "sparse files take no space for their holes",
             "take space here: a sparse source grows to its full size"),
            ("punching", able.punch_hole, "parts of a file can be freed",
             "parts of a file cannot be freed; nothing depends on it, --consume frees whole files"),
            ("locking", able.lock, "a second run into the same folder is kept out",
             "folders cannot be locked here: never start two runs into one"),
            ("names", able.tells_case, "upper and lower case are told apart",
             "upper and lower case are not told apart; no two files of ours differ in that alone"),
        ):  # fmt: skip
            self._add(topic, "ok" if works else "note", yes if works else no)

    def _measure_writing(self, folder: Path) -> None:
        facts = self._facts
        facts.fsync_seconds = measure_fsync_seconds(folder)
        facts.write_bytes_per_s = measure_write_rate(folder, most_bytes=free_bytes(folder) // 4)
        fsync = f"one fsync takes {facts.fsync_seconds * 1000:.1f} ms"
        if facts.write_bytes_per_s is None:
            self._add("writing", "note", f"{fsync}; too little is free to measure the rate")
            return
        self._add("writing", "ok", f"{format_bytes(facts.write_bytes_per_s)}/s, {fsync}")

    @property
    def _is_consuming(self) -> bool:
        """Whether the run that was interrupted here frees its source, and with it the one that goes on."""
        return self._remaining.state == "interrupted" and self._earlier.consumes

    def _check_consume(self, source: SourceCheckpoint, plan: Plan) -> bool:
        try:
            check_consume(source, plan)
        except ToolkitError as error:
            if self._is_consuming:
                raise
            self._add("consume", "note", f"--consume is not possible: {error}")
            return True
        if not same_disk(source.root, self._destination):
            self._add("consume", "note", "--consume would gain nothing: the source is on another file system")
        else:
            peak = self._facts.consume_peak_bytes = consume_peak_bytes(source, plan)
            self._facts.consume_needed_bytes = self._needed_room(source, plan, consume=True)
            size = format_bytes(peak)
            self._add("consume", "ok", f"--consume is possible, and needs at most {size} beside the source")
        return True

    def _check_space(self, source: SourceCheckpoint, plan: Plan) -> bool:
        facts = self._facts
        needed = facts.needed_bytes = self._needed_room(source, plan, consume=self._is_consuming)
        facts.free_bytes = free_bytes(self._destination)
        sizes = f"{format_bytes(needed)} needed, {format_bytes(facts.free_bytes)} free"
        if facts.free_bytes >= needed:
            self._add("space", "ok", sizes)
            return True
        advice = "free some, or choose another disk"
        if facts.consume_needed_bytes is not None and facts.consume_needed_bytes <= facts.free_bytes:
            advice = f"--consume, which frees the source as it goes, needs {format_bytes(facts.consume_needed_bytes)}"
        self._add("space", "problem", f"{sizes}; {advice}", ResourceError.exit_code)
        return True

    def _needed_room(self, source: SourceCheckpoint, plan: Plan, *, consume: bool) -> int:
        if self._facts.state is None:
            # A destination that a run would refuse: as much as into a new one, whatever lies there.
            return consume_peak_bytes(source, plan) if consume else needed_bytes(source, plan)
        return needed_room(source, plan, self._destination, self._remaining, consume=consume)

    def _check_inodes(self, source: SourceCheckpoint, plan: Plan) -> bool:
        facts = self._facts
        facts.needed_inodes = left_inodes(source, plan, self._destination, self._remaining)
        facts.free_inodes = free_inodes(self._destination)
        if facts.free_inodes is None:
            self._add("inodes", "ok", f"{facts.needed_inodes:,} files and folders, and no limit to them")
        elif facts.free_inodes >= facts.needed_inodes:
            self._add("inodes", "ok", f"{facts.needed_inodes:,} files and folders, {facts.free_inodes:,} can be made")
        else:
            self._add(
                "inodes",
                "problem",
                f"{facts.needed_inodes:,} files and folders, but only {facts.free_inodes:,} can be made; choose a "
                "file system with more inodes",
                ResourceError.exit_code,
            )
        return True

    def _check_open_files(self, plan: Plan) -> None:
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = open_files(plan, STREAM_JOBS)
        if limit == resource.RLIM_INFINITY or limit >= needed:
            self._add("open files", "ok", f"at most {needed:,} at once, as many may be open")
            return
        self._add(
            "open files", "note", f"up to {needed:,} at once, only {limit:,} may be open: use --jobs 1 or ulimit -n"
        )

    def _check_reading(self, source: SourceCheckpoint) -> bool:
        facts = self._facts
        facts.sha256_bytes_per_s, facts.cores = measure_hash_rate(), hashing_cores(STREAM_JOBS)
        hashing = f"sha256 {format_bytes(facts.sha256_bytes_per_s)}/s on each of {facts.cores} cores"
        largest = largest_shard(source)
        facts.read_bytes_per_s = None if largest is None else measure_read_rate(largest)
        if largest is None or facts.read_bytes_per_s is None:
            self._add("reading", "note", f"the source holds too little data to measure its disk; {hashing}")
            return True
        how = "" if reads_directly(largest) else " through the page cache, which may have had it"
        self._add("reading", "ok", f"{format_bytes(facts.read_bytes_per_s)}/s{how}, {hashing}")
        return True

    def _check_time(self, source: SourceCheckpoint) -> None:
        facts, remaining = self._facts, self._remaining
        if remaining.state == "complete":
            facts.seconds = 0.0
            return
        if facts.read_bytes_per_s is None or facts.sha256_bytes_per_s is None or facts.cores is None:
            return
        estimate = estimate_reshard(
            remaining.read_bytes,
            remaining.write_bytes,
            holes=hole_bytes(source, remaining.shards),
            read_rate=facts.read_bytes_per_s,
            write_rate=facts.write_bytes_per_s,
            shares_disk=bool(facts.same_file_system),
            hash_rate=facts.sha256_bytes_per_s,
            cores=facts.cores,
        )
        facts.seconds, facts.limited_by = estimate.seconds, estimate.limit
        limit = "the disk, which is read and written" if estimate.limit == "the disk" else estimate.limit
        text = f"about {format_seconds(estimate.seconds)}, limited by {limit}"
        fsyncs = remaining.write_files * (facts.fsync_seconds or 0.0)
        if fsyncs > estimate.seconds / 10:
            text += f"; to fsync {remaining.write_files:,} files takes {format_seconds(fsyncs)}, a part of it besides"
        self._add("time", "ok", text)
