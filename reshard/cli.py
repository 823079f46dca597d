"""The resharder's commands: plan, run, verify, restore. No logic here: they read arguments and print results."""

import dataclasses
import re
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from manifests import inventory
from manifests.console import (
    Group,
    format_bytes,
    format_seconds,
    json_option,
    print_json,
    printable,
    quiet_option,
)
from manifests.errors import IntegrityError
from manifests.schema import Selection
from reshard import restore as restoring
from reshard import verify as verifying
from reshard.destination import check_destination, check_room, free_bytes
from reshard.disk import measure_read_rate
from reshard.plan import Plan, make_plan
from reshard.progress import Progress
from reshard.run import needed_bytes, reshard_checkpoint
from reshard.saved import require_source
from reshard.source import SourceCheckpoint, read_source
from reshard.workers import DEFAULT_JOBS

EXIT_DAMAGED = IntegrityError.exit_code
SHOWN_NAMES = 5

F = TypeVar("F", bound=Callable[..., Any])


class NumberList(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5 only
    """Numbers and ranges such as ``0,5-9``: sorted, without repeats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse, or fail as a usage error."""
        numbers: set[int] = set()
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                self.fail(f"{value!r} is not a list of numbers and rising ranges such as 0,5-9", param, ctx)
            numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
        return tuple(sorted(numbers))


def selection_options(function: F) -> F:
    """``--layers`` and ``--experts``, the same wherever a part can be chosen."""
    function = click.option("--experts", type=NumberList(), help="Only these routed experts, such as 0,5-9.")(function)
    return click.option(
        "--layers", type=NumberList(), help="Only these layers, such as 3-10; embedding and head always come along."
    )(function)


def jobs_option(function: F) -> F:
    """``--jobs``, the same wherever files are worked on side by side."""
    return click.option(
        "--jobs", type=click.IntRange(1, 64), default=DEFAULT_JOBS, show_default=True, help="Files at the same time."
    )(function)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="expert-reshard", prog_name="reshard")
def reshard() -> None:
    """Rewrite a checkpoint into one file per layer's dense part and one per expert, and back.

    \b
    Example:
      reshard plan    DeepSeek-V3 DeepSeek-V3-experts
      reshard run     DeepSeek-V3 DeepSeek-V3-experts
      reshard restore DeepSeek-V3-experts --check

    Tensor bytes never change. SRC is a folder with shards and config.json as published.
    """


@reshard.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path), required=False)
@selection_options
@json_option
def plan(
    src: Path, dst: Path | None, layers: tuple[int, ...] | None, experts: tuple[int, ...] | None, as_json: bool
) -> None:
    """Say what `run` would do: files, bytes, free space, time. Writes nothing.

    \b
    Example:
      reshard plan DeepSeek-V3 DeepSeek-V3-experts
    """
    source = read_source(src)
    planned = make_plan(source, Selection(layers=layers, experts=experts))
    _show_plan(source, planned, dst, as_json=as_json)


@reshard.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@jobs_option
@selection_options
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@json_option
@quiet_option
def run(
    src: Path,
    dst: Path,
    jobs: int,
    layers: tuple[int, ...] | None,
    experts: tuple[int, ...] | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Reshard SRC into the new or empty folder DST. The manifest is written last.

    \b
    Example:
      reshard run DeepSeek-V3 DeepSeek-V3-experts
      reshard run DeepSeek-V3 two-layers --layers 3-4
    """
    source = read_source(src)
    planned = make_plan(source, Selection(layers=layers, experts=experts))
    if dry_run:
        _show_plan(source, planned, dst, as_json=as_json)
        return
    started = time.perf_counter()
    with Progress(planned.payload_bytes, label="reshard", quiet=quiet) as progress:
        manifest = reshard_checkpoint(source, planned, dst, jobs=jobs, progress=progress)
    seconds = time.perf_counter() - started
    result = {
        "path": str(dst),
        "files": len(manifest.files),
        "documents": len(manifest.documents),
        "bytes": sum(file.size for file in manifest.files),
        "seconds": seconds,
        "unknown_tensors": sorted(planned.unknown),
        "left_out": list(source.left_out),
    }
    if as_json:
        print_json(result)
        return
    rate = planned.payload_bytes / seconds
    click.echo(
        f"{printable(str(dst))}: {len(manifest.files):,} files, {format_bytes(planned.output_bytes)} "
        f"in {format_seconds(seconds)}, {format_bytes(rate)}/s"
    )
    if not quiet:
        _print_remarks(source, planned)
        if planned.selection.is_everything:
            path = printable(shlex.quote(str(dst)))
            click.echo(f"next: reshard restore {path} --check   proves that the original can be rebuilt", err=True)


@reshard.command()
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="Also compare with the source in this folder.")
@jobs_option
@json_option
@quiet_option
def verify(dst: Path, against: Path | None, jobs: int, as_json: bool, quiet: bool) -> None:
    """Read every byte of DST and name what is damaged: file, tensor, byte range. Exit 13 when anything is.

    \b
    Example:
      reshard verify DeepSeek-V3-experts
    """
    checkpoint = inventory.open(dst)
    source = require_source(checkpoint)
    total = sum(file.size for file in checkpoint.manifest.files)
    total += sum(document.size for document in checkpoint.manifest.documents)
    if against is not None:
        total += sum(shard.size for shard in source.shards if shard.sha256 is not None)
    with Progress(total, label="verify", quiet=quiet) as progress:
        findings = verifying.verify(checkpoint, jobs=jobs, progress=progress)
        if against is not None:
            findings += verifying.verify_against(checkpoint, against, jobs=jobs, progress=progress)
    if as_json:
        print_json({"path": str(dst), "ok": not findings, "damage": [dataclasses.asdict(f) for f in findings]})
    else:
        for finding in findings:
            tensor = f" tensor {finding.tensor}" if finding.tensor else ""
            click.echo(printable(f"{finding.path}:{tensor} bytes {finding.begin}-{finding.end}: {finding.message}"))
        if not findings:
            click.echo(f"{printable(str(dst))}: {format_bytes(progress.bytes)} read, every digest is right")
    if findings:
        raise click.exceptions.Exit(EXIT_DAMAGED)


@reshard.command()
@click.argument("dst", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--check", is_flag=True, help="Hash every shard from DST and write nothing.")
@jobs_option
@json_option
@quiet_option
def restore(dst: Path, out: Path | None, check: bool, jobs: int, as_json: bool, quiet: bool) -> None:
    """Rebuild the source byte for byte in the new or empty folder OUT, or prove with --check that it can be.

    \b
    Example:
      reshard restore DeepSeek-V3-experts --check
      reshard restore DeepSeek-V3-experts DeepSeek-V3
    """
    if check == (out is not None):
        raise click.UsageError("give either a folder OUT or --check")
    checkpoint = inventory.open(dst)
    total = sum(shard.size for shard in require_source(checkpoint).shards)
    with Progress(total, label="check" if out is None else "restore", quiet=quiet) as progress:
        if out is None:
            restored = restoring.check(checkpoint, jobs=jobs, progress=progress)
        else:
            restored = restoring.restore(checkpoint, out, jobs=jobs, progress=progress)
    if as_json:
        print_json({"path": str(out or dst), "shards": [dataclasses.asdict(shard) for shard in restored]})
        return
    size = format_bytes(sum(shard.size for shard in restored))
    if out is None:
        text = f"{dst}: all {len(restored)} source shards ({size}) can be rebuilt, every sha256 is the original's"
    else:
        text = f"{out}: {len(restored)} shards ({size}) rebuilt, every sha256 is the original's"
    click.echo(printable(text))


def _show_plan(source: SourceCheckpoint, planned: Plan, destination: Path | None, *, as_json: bool) -> None:
    """Print the plan, and then refuse a disk that is too small for it, so that the reader sees both."""
    if destination is not None:
        check_destination(source.root, destination)
    # Without a destination: the disk of the source, beside which most people put it.
    document = _describe_plan(source, planned) | {"free_bytes": free_bytes(destination or source.root)}
    if as_json:
        print_json(document)
    else:
        _print_plan(document)
    if destination is not None:
        check_room(destination, needed_bytes(source, planned))


def _describe_plan(source: SourceCheckpoint, planned: Plan) -> dict[str, Any]:
    largest = max(source.shards, key=lambda shard: source.shards[shard].file_bytes)
    rate = measure_read_rate(source.root / largest)
    return {
        "source": str(source.root),
        "shards": len(source.shards),
        "tensors": sum(len(file.tensors) for file in planned.files),
        "left_out_tensors": planned.left_out_tensors,
        "payload_bytes": planned.payload_bytes,
        "files": len(planned.files),
        "expert_files": sum(1 for file in planned.files if file.place.expert is not None),
        "needed_bytes": needed_bytes(source, planned),
        "read_bytes_per_s": rate,
        # Every byte is read once and written once, and both share the disk.
        "seconds": None if rate is None else 2 * planned.payload_bytes / rate,
        "auxiliary": [file.path for file in source.auxiliary],
        "left_out": list(source.left_out),
        "unknown_tensors": dict(planned.unknown),
    }


def _print_plan(document: dict[str, Any]) -> None:
    source = printable(document["source"])
    click.echo(f"source     {source}: {document['shards']} shards, {document['tensors']:,} tensors to take")
    click.echo(f"payload    {document['payload_bytes']:,} bytes ({format_bytes(document['payload_bytes'])})")
    click.echo(f"files      {document['files']:,}, of them {document['expert_files']:,} experts")
    click.echo(
        f"disk       {format_bytes(document['needed_bytes'])} needed, {format_bytes(document['free_bytes'])} free"
    )
    if document["seconds"] is not None:
        rate = format_bytes(document["read_bytes_per_s"])
        click.echo(f"time       about {format_seconds(document['seconds'])}: read here at {rate}/s, written as fast")
    click.echo(f"copied     {printable(', '.join(document['auxiliary'])) or 'no other files'}")
    if document["left_out"]:
        click.echo(f"left out   {printable(', '.join(document['left_out']))}")
    if document["left_out_tensors"]:
        click.echo(f"selection  leaves out {document['left_out_tensors']:,} tensors; restore needs them all")
    for line in _unknown_lines(document["unknown_tensors"]):
        click.echo(f"unknown    {line}")


def _print_remarks(source: SourceCheckpoint, planned: Plan) -> None:
    for line in _unknown_lines(planned.unknown):
        click.echo(f"note: a name that no rule knows: {line}", err=True)
    if source.left_out:
        click.echo(f"note: left out {printable(', '.join(source.left_out))}", err=True)


def _unknown_lines(unknown: Mapping[str, str]) -> list[str]:
    """The first names that no rule knows and where they go; how many there are besides."""
    lines = [f"{printable(name)}, kept in {path}" for name, path in list(unknown.items())[:SHOWN_NAMES]]
    if len(unknown) > SHOWN_NAMES:
        lines.append(f"and {len(unknown) - SHOWN_NAMES:,} more")
    return lines
