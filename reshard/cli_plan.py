"""`plan`, and what `run --dry-run` shows: what a run would do and need."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from manifests.console import counted, format_bytes, format_seconds, json_option, print_json, printable, progress
from manifests.schema import Selection
from reshard.blocks import BLOCK_BYTES
from reshard.cli_options import folder_argument, selection_options, source_argument
from reshard.consume import same_disk
from reshard.destination import check_apart, check_empty, check_inodes, check_room, check_writable, free_bytes
from reshard.disk import measure_arrival_rate, measure_hash_rate, measure_read_rate
from reshard.earlier import Earlier, find_earlier
from reshard.filesystem import free_inodes
from reshard.forecast import Estimate, estimate_reshard, hashing_cores, hole_bytes, largest_shard
from reshard.plan import Plan, make_plan
from reshard.remaining import Remaining, find_remaining, left_inodes, needed_room
from reshard.run import check_consume, consume_peak_bytes, needed_by_consuming
from reshard.source import SourceCheckpoint, local_path, read_source, source_root
from reshard.workers import REMOTE_JOBS, STREAM_JOBS, StopFlag

SHOWN_NAMES = 5


@click.command()
@source_argument("src")
@folder_argument("dst", required=False)
@selection_options
@click.option("--consume", is_flag=True, help="Also the room that `run --consume` needs beside the source.")
@json_option
def plan(
    src: Path | str,
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

    Of what DST holds already it says so; disk, inodes and time are those of the rest.
    """
    source, planned, earlier = look(src, dst, Selection(layers=layers, experts=experts))
    show_plan(source, planned, dst, consume=consume, as_json=as_json, earlier=earlier)


def look(
    src: Path | str, dst: Path | None, selection: Selection, *, quiet: bool = False
) -> tuple[SourceCheckpoint, Plan, Earlier]:
    """A source, also one that an interrupted run has begun to use up; the plan; and what the destination holds."""
    earlier = Earlier()
    if dst is not None:
        check_apart(local_path(src), dst)
        earlier = find_earlier(source_root(src), dst)
        if dst.is_dir() and earlier.journal is None and earlier.manifest is None:
            check_empty(dst)
    with progress("headers", quiet=quiet) as watch:
        source = read_source(src, earlier.freed, watch)
    return source, make_plan(source, earlier.widen(selection)), earlier


def show_plan(
    source: SourceCheckpoint,
    planned: Plan,
    destination: Path | None,
    *,
    consume: bool,
    as_json: bool,
    earlier: Earlier,
) -> None:
    """Print the plan, and then refuse a disk that is too small for it, so that the reader sees both.

    Args:
        source: What to reshard.
        planned: How.
        destination: The folder; None for the disk of the source, beside which most people put it.
        consume: Whether the run would free its source.
        as_json: Whether to print one JSON document.
        earlier: What was found in the destination.

    Raises:
        ResourceError: Too little room.
        ToolkitError: The destination or the source is not such that the run would go on.
    """
    if consume:
        check_consume(source, planned)
    remaining = find_remaining(source, planned, earlier, destination)
    if destination is not None and remaining.state != "complete":
        check_writable(destination)
    document = _describe(source, planned, destination, remaining, consume=consume)
    if as_json:
        print_json(document)
    else:
        _print(document)
    if destination is not None:
        check_room(destination, document["needed_bytes"])
        if remaining.state == "new":
            check_inodes(destination, document["needed_inodes"])


def _describe(
    source: SourceCheckpoint, planned: Plan, destination: Path | None, remaining: Remaining, *, consume: bool
) -> dict[str, Any]:
    # Beside a folder of this machine most people put it; what is on a server has none.
    folder = destination or source.place.root or Path()
    needed = needed_room(source, planned, destination, remaining, consume=consume)
    free = free_bytes(folder)
    by_consuming = None
    if needed > free or (consume and remaining.state != "complete"):
        by_consuming = needed_by_consuming(source, planned, destination, remaining.durable)
    rate, estimate = _estimate(source, remaining, folder)
    seconds = 0.0 if remaining.state == "complete" else None if estimate is None else estimate.seconds
    return {
        "source": source.name,
        "shards": len(source.shards),
        "tensors": sum(len(file.tensors) for file in planned.files),
        "left_out_tensors": planned.left_out_tensors,
        "payload_bytes": planned.payload_bytes,
        "files": len(planned.files),
        "expert_files": sum(1 for file in planned.files if file.place.expert is not None),
        "state": remaining.state,
        "kept_bytes": remaining.kept_bytes,
        "write_bytes": remaining.write_bytes,
        "write_files": remaining.write_files,
        "read_bytes": remaining.read_bytes,
        "needed_bytes": needed,
        "consume_peak_bytes": consume_peak_bytes(source, planned) if consume else None,
        "consume_needed_bytes": by_consuming,
        "free_bytes": free,
        "needed_inodes": left_inodes(source, planned, folder, remaining),
        "free_inodes": free_inodes(folder),
        "read_bytes_per_s": rate,
        "seconds": seconds,
        "limited_by": None if estimate is None else estimate.limit,
        "auxiliary": [file.path for file in source.auxiliary],
        "generated": sorted(source.generated),
        "left_out": list(source.left_out),
        "unknown_tensors": dict(planned.unknown),
    }


def _estimate(source: SourceCheckpoint, remaining: Remaining, folder: Path) -> tuple[float | None, Estimate | None]:
    """The rate at which the source is read, and the time at that; None where too little is read to tell."""
    rate = _read_rate(source, remaining) if remaining.shards else None
    if rate is None:
        return None, None
    return rate, estimate_reshard(
        remaining.read_bytes,
        remaining.write_bytes,
        holes=hole_bytes(source, remaining.shards),
        read_rate=rate,
        write_rate=None,  # to know it one has to write
        shares_disk=source.place.root is not None and same_disk(source.place.root, folder),
        hash_rate=measure_hash_rate(),
        cores=hashing_cores(STREAM_JOBS),
    )


def _read_rate(source: SourceCheckpoint, remaining: Remaining) -> float | None:
    """Bytes per second that the source's disk or server gives now; None where too little is read to tell."""
    if not source.place.is_far:
        largest = largest_shard(source)
        return None if largest is None else measure_read_rate(largest)
    name = max(remaining.shards, key=lambda name: source.shards[name].file_bytes)
    header = source.shards[name]
    begin, end = len(header.raw), header.file_bytes
    if end - begin < 2 * BLOCK_BYTES:
        return None
    with source.place.reading(name, header, [(begin, end)], connections=lambda: REMOTE_JOBS, stop=StopFlag()) as file:
        return measure_arrival_rate(file, begin, end)


def _print(document: dict[str, Any]) -> None:
    source = printable(document["source"])
    shards, tensors = counted(document["shards"], "shard"), counted(document["tensors"], "tensor")
    click.echo(f"source     {source}: {shards}, {tensors} to take")
    click.echo(f"payload    {document['payload_bytes']:,} bytes ({format_bytes(document['payload_bytes'])})")
    click.echo(f"files      {document['files']:,}, of them {counted(document['expert_files'], 'expert')}")
    if document["state"] == "complete":
        click.echo("there      all of it; nothing is left to do")
    else:
        _print_work(document)
    click.echo(f"copied     {printable(', '.join(document['auxiliary'])) or 'no other files'}")
    if document["generated"]:
        click.echo(f"made       {printable(', '.join(document['generated']))}, out of what the GGUF file says")
    if document["left_out"]:
        click.echo(f"left out   {printable(', '.join(document['left_out']))}")
    if document["left_out_tensors"]:
        click.echo(f"selection  leaves out {counted(document['left_out_tensors'], 'tensor')}; restore needs them all")
    for line in unknown_lines(document["unknown_tensors"]):
        click.echo(f"unknown    {line}")


def _print_work(document: dict[str, Any]) -> None:
    """What is there of it, and what the rest needs."""
    if document["state"] != "new":
        kept = f"{format_bytes(document['kept_bytes'])} of {format_bytes(document['payload_bytes'])}"
        files = f"{document['files'] - document['write_files']:,} of {counted(document['files'], 'file')}"
        whose = "an interrupted run" if document["state"] == "interrupted" else "an earlier run"
        click.echo(f"there      {kept}, {files}, of {whose}")
        click.echo(f"to write   {format_bytes(document['write_bytes'])}, {counted(document['write_files'], 'file')}")
    needed, free = document["needed_bytes"], document["free_bytes"]
    click.echo(f"disk       {format_bytes(needed)} needed, {format_bytes(free)} free")
    if document["consume_peak_bytes"] is not None:
        peak = format_bytes(document["consume_peak_bytes"])
        click.echo(f"consume    at most {peak} beside the source at any time; the source is gone at the end")
    elif document["consume_needed_bytes"] is not None and document["consume_needed_bytes"] < needed:
        least = format_bytes(document["consume_needed_bytes"])
        click.echo(f"consume    --consume needs only {least}: it frees the source as it goes")
    free = document["free_inodes"]
    can_be_made = "no limit to them" if free is None else f"{free:,} can be made"
    click.echo(f"inodes     {document['needed_inodes']:,} files and folders, {can_be_made}")
    if document["seconds"] is not None:
        rate = format_bytes(document["read_bytes_per_s"])
        seconds = format_seconds(document["seconds"])
        click.echo(f"time       about {seconds}, limited by {document['limited_by']}: read here at {rate}/s")


def unknown_lines(unknown: Mapping[str, str]) -> list[str]:
    """The first names that no rule knows and where they go; how many there are besides."""
    lines = [f"{printable(name)}, kept in {path}" for name, path in list(unknown.items())[:SHOWN_NAMES]]
    if len(unknown) > SHOWN_NAMES:
        lines.append(f"and {len(unknown) - SHOWN_NAMES:,} more")
    return lines
