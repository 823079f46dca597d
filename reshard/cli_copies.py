"""What is done with a resharded checkpoint: verify it, repair it, restore its source."""

import dataclasses
import os
import shlex
from functools import partial
from pathlib import Path

import click

from manifests import inventory, urls
from manifests.console import counted, format_bytes, printable, progress, quiet_option
from manifests.errors import IntegrityError
from reshard import discard as discarding
from reshard import repair as repairing
from reshard import restore as restoring
from reshard import verify as verifying
from reshard.cli_events import EventStream
from reshard.cli_options import (
    SourcePath,
    confirm_consume,
    consume_options,
    continuable,
    continue_options,
    events_option,
    folder_argument,
    jobs_option,
    stream_jobs,
    streams_option,
)
from reshard.repair import UnrepairedError
from reshard.saved import require_source
from reshard.verify import Damage
from reshard.workers import DEFAULT_JOBS

EXIT_DAMAGED = IntegrityError.exit_code
SHOWN_NAMES = 5


@click.command()
@folder_argument("dst")
@click.option(
    "--against", type=SourcePath(path_type=Path), help="Also compare with the source: a folder, GGUF file or address."
)
@jobs_option
@events_option
@quiet_option
def verify(dst: Path, against: Path | str | None, jobs: int, as_json: bool, quiet: bool) -> None:
    """Read every byte of DST and name what is damaged: file, tensor, byte range. Exit 13 when anything is.

    \b
    Example:
      reshard verify DeepSeek-V3-experts
    """
    checkpoint = inventory.open(dst)
    source = require_source(checkpoint)
    root = None if against is None else verifying.source_folder(checkpoint, against)
    total = sum(file.size for file in checkpoint.manifest.files)
    total += sum(document.size for document in checkpoint.manifest.documents)
    if root is not None:
        total += sum(shard.size for shard in source.shards if shard.sha256 is not None)
    place = verifying.find_published(checkpoint, str(against)) if against is not None and root is None else None
    unproven: list[str] = []
    events = EventStream(enabled=as_json)
    with events.show_progress(total, label="verify", quiet=quiet) as progress:
        progress.event("begin", command="verify", path=str(dst), total_bytes=total)
        own = verifying.verify(checkpoint, jobs=jobs, progress=progress)
        findings = list(own)
        if root is not None:
            findings += verifying.verify_against(checkpoint, root, jobs=jobs, progress=progress)
        elif place is not None:
            findings += verifying.verify_published(checkpoint, place, jobs=jobs, progress=progress)
            unproven = [shard.name for shard in source.shards if place.sha256(shard.name) is None]
    unnamed = verifying.find_unnamed(checkpoint)
    if as_json:
        damage = [dataclasses.asdict(finding) for finding in findings]
        events.end({"path": str(dst), "ok": not findings, "damage": damage, "unnamed": unnamed, "unproven": unproven})
    else:
        for finding in findings:
            tensor = f" tensor {finding.tensor}" if finding.tensor else ""
            click.echo(printable(f"{finding.path}:{tensor} bytes {finding.begin}-{finding.end}: {finding.message}"))
        if not findings:
            click.echo(f"{printable(str(dst))}: {format_bytes(progress.bytes)} read, every digest is right")
        if not quiet:
            _advise(dst, own, unnamed)
            if unproven:
                what = "its shard" if len(unproven) == 1 else f"{len(unproven)} of its shards"
                why = f"{what} by size and header: no sha256 is published, and no shard is fetched for this"
                click.echo(f"note: {printable(urls.shown_path(against or ''))} was compared in {why}", err=True)
    if findings:
        raise click.exceptions.Exit(EXIT_DAMAGED)


def _advise(dst: Path, findings: list[Damage], unnamed: list[str]) -> None:
    """What is no damage but worth knowing, and what to do about what is."""
    if unnamed:
        shown = ", ".join(unnamed[:SHOWN_NAMES]) + (", ..." if len(unnamed) > SHOWN_NAMES else "")
        what = "1 file is" if len(unnamed) == 1 else f"{len(unnamed)} files are"
        click.echo(f"note: {what} in the folder and not in the manifest: {printable(shown)}", err=True)
    # What may not be read is no damage that a repair could find, let alone mend.
    closed = [path for path in dict.fromkeys(finding.path for finding in findings) if _is_closed(dst / path)]
    if closed:
        what = "1 file" if len(closed) == 1 else f"{len(closed)} files, first"
        click.echo(f"next: let {what} {printable(closed[0])} be read (chmod, chown), and verify again", err=True)
    elif findings:
        command = f"reshard repair {shlex.quote(str(dst))} --from SRC"
        click.echo(f"next: {printable(command)}   takes what is damaged from the shards or another copy", err=True)


def _is_closed(path: Path) -> bool:
    return path.exists() and not os.access(path, os.R_OK)


@click.command()
@folder_argument("dst")
@click.option(
    "--from",
    "source",
    type=SourcePath(path_type=Path),
    required=True,
    help="The shards, or another copy: a folder, a file or an address.",
)
@jobs_option
@events_option
@quiet_option
def repair(dst: Path, source: Path | str, jobs: int, as_json: bool, quiet: bool) -> None:
    """Verify DST, and copy what is damaged again: from the original shards or from another resharded copy.

    \b
    Example:
      reshard repair DeepSeek-V3-experts --from DeepSeek-V3

    Nothing is taken whose digest is not the one in DST's manifest. Exit 13 when something is damaged still.
    """
    events = EventStream(enabled=as_json)
    events.begin(command="repair", source=urls.shown_path(source), path=str(dst))
    failure: UnrepairedError | None = None
    try:
        with progress("headers", quiet=quiet) as watch:
            repaired = repairing.repair(
                dst, source, jobs=jobs, progress=partial(events.show_progress, quiet=quiet), watch=watch
            )
    except UnrepairedError as error:
        failure = error
        repaired = list(error.repaired)
    if as_json:
        failures = [] if failure is None else list(failure.failures)
        events.end({"path": str(dst), "repaired": [dataclasses.asdict(r) for r in repaired], "failures": failures})
    else:
        for each in repaired:
            what = f"{format_bytes(each.taken_bytes)} taken from {urls.shown_path(source)}"
            click.echo(printable(f"{each.path}: repaired, {what}"))
        if not repaired and failure is None:
            click.echo(f"{printable(str(dst))}: nothing is damaged")
    if failure is not None:
        raise failure


@click.command()
@folder_argument("dst")
@folder_argument("out", required=False)
@click.option("--check", is_flag=True, help="Hash every shard from DST and write nothing.")
@streams_option
@consume_options
@continue_options
@events_option
@quiet_option
def restore(
    dst: Path,
    out: Path | None,
    check: bool,
    jobs: int | None,
    consume: bool,
    yes: bool,
    discard: bool,
    paranoid: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Rebuild the source byte for byte in the new or empty folder OUT, or prove with --check that it can be.

    \b
    Example:
      reshard restore DeepSeek-V3-experts --check
      reshard restore DeepSeek-V3-experts DeepSeek-V3

    Interrupted in any way, the same command goes on from the last shard that was finished.
    """
    if check == (out is not None):
        raise click.UsageError("give either a folder OUT or --check")
    if out is None and (consume or discard or paranoid):
        raise click.UsageError("--check writes nothing: --consume, --discard and --paranoid go with a folder OUT")
    is_confirmed = out is not None and discard and _discard(dst, out, consume=consume, yes=yes)
    events = EventStream(enabled=as_json)
    if out is not None and restoring.clean_up_restored(dst, out):
        _tell_cleaned(dst, out, events)
        return
    checkpoint = inventory.open(dst) if out is None else restoring.open_restored(dst, out)
    if consume and not is_confirmed:
        confirm_consume(f"the files of {printable(str(dst))}", yes=yes)
    total = sum(shard.size for shard in require_source(checkpoint).shards)
    label = "check" if out is None else "restore"
    with events.show_progress(total, label=label, quiet=quiet) as progress:
        progress.event("begin", command=label, source=str(dst), path=str(out or dst), total_bytes=total)
        if out is None:
            restored = restoring.check(checkpoint, jobs=jobs or DEFAULT_JOBS, progress=progress)
        else:
            with continuable(out, consume=consume, quiet=quiet):
                restored = restoring.restore(
                    checkpoint,
                    out,
                    jobs=stream_jobs(jobs, consume=consume),
                    progress=progress,
                    consume=consume,
                    paranoid=paranoid,
                )
    if as_json:
        events.end({"path": str(out or dst), "shards": [dataclasses.asdict(shard) for shard in restored]})
        return
    size = format_bytes(sum(shard.size for shard in restored))
    if out is None:
        shards = "the source shard" if len(restored) == 1 else f"all {len(restored)} source shards"
        text = f"{dst}: {shards} ({size}) can be rebuilt, every sha256 is the original's"
    else:
        text = f"{out}: {counted(len(restored), 'shard')} ({size}) rebuilt, every sha256 is the original's"
    click.echo(printable(text))


def _discard(dst: Path, out: Path, *, consume: bool, yes: bool) -> bool:
    """Remove what an interrupted restore left; whether it was asked if files may be deleted."""
    if not discarding.check_discardable(dst, out):
        return False
    if consume:
        confirm_consume(f"the files of {printable(str(dst))}", yes=yes)
    discarding.discard(dst, out)
    return True


def _tell_cleaned(dst: Path, out: Path, events: EventStream) -> None:
    if events.enabled:
        events.begin(command="restore", source=str(dst), path=str(out))
        events.end({"path": str(out), "shards": []})
    else:
        click.echo(f"{printable(str(out))}: was restored before; what was left of {printable(str(dst))} is removed")
