"""`pack` and `unpack`: experts compressed for cold storage, and made mappable again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from manifests.console import format_bytes, printable, quiet_option
from manifests.schema import Manifest
from reshard import packing
from reshard.cli_events import EventStream
from reshard.cli_options import events_option, folder_argument, jobs_option
from reshard.packing import Task
from reshard.workers import DEFAULT_JOBS


@click.command()
@folder_argument("dst")
@jobs_option
@events_option
@quiet_option
def pack(dst: Path, jobs: int, as_json: bool, quiet: bool) -> None:
    """Compress the experts of DST with zstd, where they lie. The runner cannot use them until they are unpacked.

    \b
    Example:
      reshard pack DeepSeek-V3-experts

    Each is proven before its plain file is deleted. Interrupted, the same command goes on.
    """
    pack_folder(dst, EventStream(enabled=as_json), "pack", jobs=jobs, quiet=quiet)


@click.command()
@folder_argument("dst")
@jobs_option
@events_option
@quiet_option
def unpack(dst: Path, jobs: int, as_json: bool, quiet: bool) -> None:
    """Make the packed experts of DST plain files again, byte for byte as they were.

    \b
    Example:
      reshard unpack DeepSeek-V3-experts
    """
    pack_folder(dst, EventStream(enabled=as_json), "unpack", jobs=jobs, quiet=quiet)


def pack_folder(
    dst: Path,
    events: EventStream,
    task: Task,
    *,
    quiet: bool,
    jobs: int = DEFAULT_JOBS,
    result: Mapping[str, Any] | None = None,
) -> None:
    """Do one of the two, and show it, together with the result of what went before."""
    manifest = _convert(dst, events, task, quiet=quiet, jobs=jobs)
    packed = [file for file in manifest.files if file.codec != "none"]
    stored, plain = sum(file.size for file in packed), sum(file.unpacked_size for file in packed)
    if events.enabled:
        events.end(
            {
                **(result or {}),
                "path": str(dst),
                "packed_files": len(packed),
                "packed_bytes": stored,
                "plain_bytes": plain,
            }
        )
    elif packed:
        share = f"{stored / plain:.1%} of {format_bytes(plain)}"
        click.echo(f"{printable(str(dst))}: {len(packed):,} experts are packed, {share}; `reshard unpack` undoes it")
    else:
        click.echo(f"{printable(str(dst))}: all experts are plain files")


def finish_packing(dst: Path, events: EventStream, *, quiet: bool) -> None:
    """Bring one to its end that was interrupted; nothing happens when none was."""
    task = packing.interrupted_task(dst)
    if task is not None:
        _convert(dst, events, task, quiet=quiet, jobs=DEFAULT_JOBS)


def _convert(dst: Path, events: EventStream, task: Task, *, quiet: bool, jobs: int) -> Manifest:
    total = packing.expert_bytes(dst)
    with events.show_progress(total, label=task, quiet=quiet) as progress:
        progress.event("begin", command=task, path=str(dst), total_bytes=total)
        work = packing.pack if task == "pack" else packing.unpack
        return work(dst, jobs=jobs, progress=progress)
