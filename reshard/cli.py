"""The resharder's commands: the group and `run`. No logic here: they read arguments and print results."""

import shlex
import time
from pathlib import Path

import click

from manifests import urls
from manifests.console import Group, counted, format_bytes, format_seconds, printable, quiet_option
from manifests.paths import MANIFEST_NAME
from manifests.safety import require_folder
from manifests.schema import Selection
from reshard import discard as discarding
from reshard.blocks import BLOCK_BYTES
from reshard.cli_copies import repair, restore, verify
from reshard.cli_doctor import doctor
from reshard.cli_events import EventStream
from reshard.cli_options import (
    confirm_consume,
    consume_options,
    continuable,
    continue_options,
    events_option,
    folder_argument,
    selection_options,
    source_argument,
    stream_jobs,
    streams_option,
)
from reshard.cli_packing import finish_packing, pack, pack_folder, unpack
from reshard.cli_plan import look, plan, show_plan, unknown_lines
from reshard.consume import same_disk
from reshard.disk import measure_read_rate
from reshard.forecast import hole_bytes, largest_shard, share_of_disk
from reshard.plan import Plan
from reshard.run import Outcome, check_consume, reshard_checkpoint
from reshard.source import SourceCheckpoint, source_root

SAMPLE_SHARE = 64
"""To measure the disk before a run, this fraction of the payload is read: a hundredth of the run's time or less."""


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="expert-reshard", prog_name="reshard")
def reshard() -> None:
    """Rewrite a checkpoint into one file per layer's dense part and one per expert, and back.

    \b
    Example:
      reshard plan    DeepSeek-V3 DeepSeek-V3-experts
      reshard run     DeepSeek-V3 DeepSeek-V3-experts
      reshard restore DeepSeek-V3-experts --check

    Tensor bytes never change. SRC is a folder with shards and config.json as published, or a GGUF file, or the
    address of one of these.
    """


for command in (doctor, pack, plan, repair, restore, unpack, verify):
    reshard.add_command(command)


@reshard.command()
@source_argument("src")
@folder_argument("dst")
@streams_option
@selection_options
@click.option("--codec", type=click.Choice(["zstd"]), help="Store the experts compressed, for cold storage.")
@consume_options
@continue_options
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@events_option
@quiet_option
def run(
    src: Path | str,
    dst: Path,
    jobs: int | None,
    layers: tuple[int, ...] | None,
    experts: tuple[int, ...] | None,
    codec: str | None,
    consume: bool,
    yes: bool,
    discard: bool,
    paranoid: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Reshard SRC into the new or empty folder DST. The manifest is written last.

    \b
    Example:
      reshard run DeepSeek-V3 DeepSeek-V3-experts
      reshard run DeepSeek-V3 DeepSeek-V3-experts --consume
      reshard run DeepSeek-V3 two-layers --layers 3-4
      reshard run hf://deepseek-ai/DeepSeek-V3 two-layers --layers 3-4

    Interrupted in any way, the same command goes on from the last shard that was finished; where SRC is an address,
    from the bytes of a shard that were safe. With other layers or experts it adds to what DST holds.

    At the end it says how fast it was, as a share of the rate at which the source's disk was read just before; where
    source and destination share that disk, reading and writing count together.
    """
    if dry_run and discard:
        raise click.UsageError("--dry-run writes nothing, and --discard removes what is there: leave out one of them")
    events, selection = EventStream(enabled=as_json), Selection(layers=layers, experts=experts)
    is_confirmed, root = False, source_root(src)
    if discard and discarding.check_discardable(root, dst):
        # Nothing goes for a command that is refused or not meant.
        source, planned, _ = look(src, None, selection, quiet=quiet)
        is_confirmed = _confirm(source, planned, consume=consume, yes=yes)
        discarding.discard(root, dst)
    elif not dry_run:
        _note_idle_discard(dst, discards=discard and not quiet)
        # All was there before it became this: then the command goes on as with any complete checkpoint.
        _finish_packing(root, dst, events, quiet=quiet)
    source, planned, earlier = look(src, dst, selection, quiet=quiet)
    if dry_run:
        show_plan(source, planned, dst, consume=consume, as_json=as_json, earlier=earlier)
        return
    is_far = source.place.is_far
    if not is_confirmed:
        _confirm(source, planned, consume=consume, yes=yes)
    remarks = _remarks(source, planned)
    read_rate = _measure(source, planned)
    started = time.perf_counter()
    with events.show_progress(planned.payload_bytes, label="reshard", quiet=quiet) as progress:
        progress.event(
            "begin",
            command="run",
            source=urls.shown_path(src),
            path=str(dst),
            shards=len(source.shards),
            files=len(planned.files),
            total_bytes=planned.payload_bytes,
        )
        for remark in remarks:
            progress.event("remark", message=remark)
        with continuable(dst, consume=consume or earlier.consumes, quiet=quiet, is_far=is_far):
            outcome = reshard_checkpoint(
                source,
                planned,
                dst,
                jobs=stream_jobs(jobs, consume=consume, is_far=is_far),
                progress=progress,
                consume=consume,
                paranoid=paranoid,
                known=earlier,
            )
    seconds = time.perf_counter() - started
    shares_disk = root is not None and same_disk(root, dst)
    share = None
    if read_rate is not None:
        share = share_of_disk(outcome.moved_bytes, seconds, read_rate=read_rate, shares_disk=shares_disk)
    if not as_json:
        click.echo(f"{printable(str(dst))}: {_result(outcome, seconds)}{_share(share, shares_disk=shares_disk)}")
    result = {
        "path": str(dst),
        "files": outcome.files,
        "documents": outcome.documents,
        "bytes": outcome.file_bytes,
        "moved_bytes": outcome.moved_bytes,
        "kept_bytes": outcome.kept_bytes,
        "seconds": seconds,
        "read_bytes_per_s": read_rate,
        "share_of_disk": share,
        "unknown_tensors": sorted(planned.unknown),
        "left_out": list(source.left_out),
    }
    if codec is not None:
        pack_folder(dst, events, "pack", quiet=quiet, result=result)
    elif as_json:
        events.end(result)
    if not (as_json or quiet):
        if consume and any(source.place.has(shard) for shard in source.shards):
            why = f"{printable(str(dst))} was complete before; prove it, and delete {printable(str(src))} yourself"
            remarks.append(f"nothing was freed, for {why}")
        _advise(dst, planned, remarks)


def _finish_packing(root: Path | None, dst: Path, events: EventStream, *, quiet: bool) -> None:
    """Finish what was interrupted behind a run, if the source is where it is said to be."""
    if root is not None:
        require_folder(root, "give the folder that holds the checkpoint's shards, or a GGUF file")
    finish_packing(dst, events, quiet=quiet)


def _advise(dst: Path, planned: Plan, remarks: list[str]) -> None:
    for remark in remarks:
        click.echo(f"note: {remark}", err=True)
    if planned.selection.is_everything:
        path = printable(shlex.quote(str(dst)))
        click.echo(f"next: reshard restore {path} --check   proves that the original can be rebuilt", err=True)


def _note_idle_discard(dst: Path, *, discards: bool) -> None:
    if discards and (dst / MANIFEST_NAME).exists():
        click.echo(f"note: {printable(str(dst))} is finished, so --discard removes nothing", err=True)


def _confirm(source: SourceCheckpoint, planned: Plan, *, consume: bool, yes: bool) -> bool:
    """Whether it may begin; refuses what cannot be consumed, and asks."""
    if consume:
        check_consume(source, planned)
        confirm_consume(_shards_of(source), yes=yes)
    return True


def _shards_of(source: SourceCheckpoint) -> str:
    """What --consume frees of a source: of a folder in which one GGUF file was named, no other file."""
    path, others = printable(source.name), len(source.shards) - 1
    if source.file is None:
        return f"the shards of {path}"
    return f"{path} and the {counted(others, 'other file')} of its set" if others else path


def _measure(source: SourceCheckpoint, planned: Plan) -> float | None:
    """The rate at which the source's disk is read now, where the run is long enough for the question.

    Holes are not read, so a source that has some tells nothing of its disk.
    """
    sample_bytes = planned.payload_bytes // SAMPLE_SHARE
    largest = largest_shard(source)
    if largest is None or sample_bytes < 8 * BLOCK_BYTES or hole_bytes(source):
        return None
    return measure_read_rate(largest, sample_bytes=sample_bytes)


def _result(outcome: Outcome, seconds: float) -> str:
    files = f"{counted(outcome.files, 'file')}, {format_bytes(outcome.file_bytes)}"
    if outcome.kept_bytes and not outcome.moved_bytes:
        return f"{files}, all of it was there already"
    rate = f"in {format_seconds(seconds)}, {format_bytes(outcome.moved_bytes / seconds)}/s"
    if outcome.kept_bytes:
        return f"{files}; {format_bytes(outcome.moved_bytes)} of it {rate}, the rest was there already"
    return f"{files} {rate}"


def _share(share: float | None, *, shares_disk: bool) -> str:
    if not share:
        return ""
    return f", {share:.0%} of what {'this disk reads and writes' if shares_disk else 'the disk of the source reads'}"


def _remarks(source: SourceCheckpoint, planned: Plan) -> list[str]:
    remarks = [f"a name that no rule knows: {line}" for line in unknown_lines(planned.unknown)]
    if not source.config:
        remarks.append(f"{printable(source.name)} has no config.json: without it the result cannot be run")
    if source.left_out:
        remarks.append(f"left out {printable(', '.join(source.left_out))}")
    return remarks
