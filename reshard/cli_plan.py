"""`plan`, and what `run --dry-run` shows: what a run would do and need."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from manifests.console import format_bytes, format_seconds, json_option, print_json, printable
from manifests.schema import Selection
from reshard.cli_options import folder_argument, selection_options
from reshard.consume import same_disk
from reshard.destination import check_apart, check_empty, check_room, free_bytes
from reshard.disk import measure_hash_rate, measure_read_rate
from reshard.earlier import Earlier, find_earlier
from reshard.filesystem import free_inodes
from reshard.forecast import Estimate, estimate_reshard, hashing_cores, hole_bytes, largest_shard, needed_inodes
from reshard.plan import Plan, make_plan
from reshard.run import check_consume, consume_peak_bytes, needed_bytes, still_needed_bytes
from reshard.source import SourceCheckpoint, read_source
from reshard.workers import STREAM_JOBS

SHOWN_NAMES = 5


@click.command()
@folder_argument("src")
@folder_argument("dst", required=False)
@selection_options
@click.option("--consume", is_flag=True, help="Also the room that `run --consume` needs beside the source.")
@json_option
def plan(
    src: Path,
    dst: Path | None,
    layers: tuple[int, ...] | None,
    experts: tuple[int, ...] | None,
    consume: bool,
    as_json: bool,
) -> None:
    """Say what `run` would do: files, bytes, free space, time. Writes nothing.

    \b
    Example:
      reshard plan DeepSeek-V3 DeepSeek-V3-experts
    """
    source, planned = look(src, dst, Selection(layers=layers, experts=experts))
    show_plan(source, planned, dst, consume=consume, as_json=as_json)


def look(src: Path, dst: Path | None, selection: Selection) -> tuple[SourceCheckpoint, Plan]:
    """A source, also one that an interrupted run has begun to use up, and the plan with what the destination holds."""
    earlier = Earlier()
    if dst is not None:
        check_apart(src, dst)
        earlier = find_earlier(src, dst)
        if dst.is_dir() and earlier.journal is None and earlier.manifest is None:
            check_empty(dst)
    source = read_source(src, earlier.freed)
    return source, make_plan(source, earlier.widen(selection))


def show_plan(
    source: SourceCheckpoint, planned: Plan, destination: Path | None, *, consume: bool, as_json: bool
) -> None:
    """Print the plan, and then refuse a disk that is too small for it, so that the reader sees both."""
    # Without a destination: the disk of the source, beside which most people put it.
    if consume:
        check_consume(source, planned)
    document = _describe(source, planned, destination or source.root, consume=consume)
    if as_json:
        print_json(document)
    else:
        _print(document)
    if destination is not None:
        check_room(destination, still_needed_bytes(source, planned, destination, consume=consume, jobs=1))


def _describe(source: SourceCheckpoint, planned: Plan, destination: Path, *, consume: bool) -> dict[str, Any]:
    needed = needed_bytes(source, planned)
    consume_peak = consume_peak_bytes(source, planned) if consume else None
    if consume_peak is not None and same_disk(source.root, destination):
        needed = consume_peak
    rate, estimate = _estimate(source, planned, destination)
    return {
        "source": str(source.root),
        "shards": len(source.shards),
        "tensors": sum(len(file.tensors) for file in planned.files),
        "left_out_tensors": planned.left_out_tensors,
        "payload_bytes": planned.payload_bytes,
        "files": len(planned.files),
        "expert_files": sum(1 for file in planned.files if file.place.expert is not None),
        "needed_bytes": needed,
        "consume_peak_bytes": consume_peak,
        "free_bytes": free_bytes(destination),
        "needed_inodes": needed_inodes(source, planned),
        "free_inodes": free_inodes(destination),
        "read_bytes_per_s": rate,
        "seconds": None if estimate is None else estimate.seconds,
        "limited_by": None if estimate is None else estimate.limit,
        "auxiliary": [file.path for file in source.auxiliary],
        "left_out": list(source.left_out),
        "unknown_tensors": dict(planned.unknown),
    }


def _estimate(source: SourceCheckpoint, planned: Plan, destination: Path) -> tuple[float | None, Estimate | None]:
    """The rate at which the source is read, and the time at that; None for a source too small to tell."""
    largest = largest_shard(source)
    rate = None if largest is None else measure_read_rate(largest)
    if rate is None:
        return None, None
    return rate, estimate_reshard(
        planned.payload_bytes,
        holes=hole_bytes(source),
        read_rate=rate,
        write_rate=None,  # to know it one has to write
        shares_disk=same_disk(source.root, destination),
        hash_rate=measure_hash_rate(),
        cores=hashing_cores(STREAM_JOBS),
    )


def _print(document: dict[str, Any]) -> None:
    source = printable(document["source"])
    click.echo(f"source     {source}: {document['shards']} shards, {document['tensors']:,} tensors to take")
    click.echo(f"payload    {document['payload_bytes']:,} bytes ({format_bytes(document['payload_bytes'])})")
    click.echo(f"files      {document['files']:,}, of them {document['expert_files']:,} experts")
    click.echo(
        f"disk       {format_bytes(document['needed_bytes'])} needed, {format_bytes(document['free_bytes'])} free"
    )
    if document["consume_peak_bytes"] is not None:
        peak = format_bytes(document["consume_peak_bytes"])
        click.echo(f"consume    at most {peak} beside the source at any time; the source is gone at the end")
    free = document["free_inodes"]
    can_be_made = "no limit to them" if free is None else f"{free:,} can be made"
    click.echo(f"inodes     {document['needed_inodes']:,} files and folders, {can_be_made}")
    if document["seconds"] is not None:
        rate = format_bytes(document["read_bytes_per_s"])
        seconds = format_seconds(document["seconds"])
        click.echo(f"time       about {seconds}, limited by {document['limited_by']}: read here at {rate}/s")
    click.echo(f"copied     {printable(', '.join(document['auxiliary'])) or 'no other files'}")
    if document["left_out"]:
        click.echo(f"left out   {printable(', '.join(document['left_out']))}")
    if document["left_out_tensors"]:
        click.echo(f"selection  leaves out {document['left_out_tensors']:,} tensors; restore needs them all")
    for line in unknown_lines(document["unknown_tensors"]):
        click.echo(f"unknown    {line}")


def unknown_lines(unknown: Mapping[str, str]) -> list[str]:
    """The first names that no rule knows and where they go; how many there are besides."""
    lines = [f"{printable(name)}, kept in {path}" for name, path in list(unknown.items())[:SHOWN_NAMES]]
    if len(unknown) > SHOWN_NAMES:
        lines.append(f"and {len(unknown) - SHOWN_NAMES:,} more")
    return lines
