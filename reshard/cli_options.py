"""What several commands share: their options and arguments. Knows click and numbers."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from manifests import urls
from manifests.console import printable
from manifests.errors import ToolkitError
from manifests.paths import JOURNAL_NAME
from reshard.workers import DEFAULT_JOBS, REMOTE_JOBS, STREAM_JOBS

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


class FolderPath(click.Path):
    """A path on this machine. Made into a path, an address would be one of a folder called ``http:``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Give the path, or fail as a usage error."""
        if urls.is_url(value):
            self.fail(f"{urls.shown(value)} is an address; it must be a folder of this machine", param, ctx)
        return super().convert(value, param, ctx)


class SourcePath(click.Path):
    """A path on this machine, or an address, which stays the text that it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Give the path or the address."""
        return value if urls.is_url(value) else super().convert(value, param, ctx)


def folder_argument(name: str, *, required: bool = True) -> Callable[[F], F]:
    """A folder as an argument; that it is there is the command's to ask."""
    return click.argument(name, type=FolderPath(path_type=Path), required=required)


def source_argument(name: str) -> Callable[[F], F]:
    """A source as an argument: a folder, a file, or an address as text."""
    return click.argument(name, type=SourcePath(path_type=Path))


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


def streams_option(function: F) -> F:
    """``--jobs`` where shards are streamed; None when it is not given, see `stream_jobs`."""
    return click.option(
        "--jobs",
        type=click.IntRange(1, 64),
        help=f"Shards at the same time: {STREAM_JOBS} unless given, 1 with --consume. "
        f"With an address, connections: {REMOTE_JOBS} unless given.",
    )(function)


def stream_jobs(jobs: int | None, *, consume: bool, is_far: bool = False) -> int:
    """As many as were asked for. Each shard that is under way takes its room twice, which --consume is to spare."""
    if jobs is not None:
        return jobs
    return REMOTE_JOBS if is_far else 1 if consume else STREAM_JOBS


def consume_options(function: F) -> F:
    """``--consume`` and ``--yes``, the same there and back."""
    function = click.option("--yes", is_flag=True, help="Do not ask before --consume deletes anything.")(function)
    return click.option(
        "--consume",
        is_flag=True,
        help="Delete each file that was read as soon as its bytes are safe in the other folder.",
    )(function)


def confirm_consume(what: str, *, yes: bool) -> None:
    """Ask whether files may be deleted.

    Args:
        what: Those files, as a sentence names them.
        yes: Whether that was answered before.

    Raises:
        click.UsageError: Nobody is there to answer.
        ToolkitError: They may not.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"--consume deletes {what} as it goes: give --yes as well")
    if not click.confirm(f"--consume deletes {what}, each as soon as its bytes are safe. Go on?", err=True):
        raise ToolkitError("nothing was done; leave out --consume to keep the files")


def continue_options(function: F) -> F:
    """``--paranoid`` and ``--discard``, for what an interrupted command left."""
    function = click.option(
        "--discard", is_flag=True, help="Remove what an interrupted command left, and start again."
    )(function)
    return click.option(
        "--paranoid", is_flag=True, help="Read and hash all that an interrupted command left before trusting it."
    )(function)


@contextmanager
def continuable(folder: Path, *, consume: bool, quiet: bool, is_far: bool = False) -> Iterator[None]:
    """Whoever stops a run is told that it can go on, and start again unless it may have used up its source."""
    try:
        yield
    except KeyboardInterrupt:
        if not quiet and (folder / JOURNAL_NAME).exists():
            other = "" if consume else ", --discard starts again"
            where = "what is safe on disk" if is_far else "the last finished shard"
            click.echo(f"{printable(str(folder))}: the same command goes on from {where}{other}", err=True)
        raise


def events_option(function: F) -> F:
    """``--json`` of a command that takes long: see `reshard.cli_events`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document per line: what happens, and last the result."
    )(function)
