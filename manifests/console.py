"""How every command talks: one error boundary, shared options, sizes and names fit for a terminal.

stdout is data, stderr is talk. This file knows click and the error tree, and nothing of manifests.
"""

import errno
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click

from manifests.errors import ResourceError, ToolkitError

EXIT_INTERRUPTED = 130
_LOGGER = logging.getLogger("manifests")

F = TypeVar("F", bound=Callable[..., Any])


class Stopped(KeyboardInterrupt):
    """A service manager's stop or a lost terminal: an interrupt, but nobody is there to go on after it."""


class _Notes(logging.Handler):
    """What is said while work goes on, such as that a server is waited for: a line on stderr, over a bar there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line. Nobody's work ends because it cannot be written."""
        with suppress(OSError):
            # The bar is drawn again on the next line.
            wiped = "\r\x1b[K" if sys.stderr is not None and sys.stderr.isatty() else ""
            click.echo(f"{wiped}note: {printable(record.getMessage())}", err=True)


class Group(click.Group):
    """A click group with the error boundary of all programs: one sentence on stderr and the right exit code.

    ``<NAME>_DEBUG=1`` (the program's name in capitals) shows the traceback instead.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the program; end the process with the exit code of what happened."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        name = self.name or "program"
        _show_notes()
        if threading.current_thread() is threading.main_thread():
            # Both are interrupts like Ctrl-C: what is half-made is removed on the way out. One that was told to be
            # ignored (nohup) stays ignored.
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, _stop)
        try:
            # click would turn Ctrl-C into exit code 1; outside its standalone mode it lets us decide.
            result = super().main(args, prog_name, complete_var, False, **extra)
            if sys.stdout is not None:  # None when the caller closed it
                sys.stdout.flush()
            sys.exit(result if isinstance(result, int) else 0)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo(f"{name}: interrupted", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output went away (for example `head`): not our failure, and nothing to say.
            _drop_broken_stdout()
            sys.exit(ToolkitError.exit_code)
        except ToolkitError as error:
            if _is_debugging(name):
                raise
            # A server's words may be in it.
            click.echo(printable(f"{name}: {error}"), err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            # A failing disk, a permission, a limit: met where nobody had a better sentence for it.
            if _is_debugging(name):
                raise
            click.echo(f"{name}: {_where(error)}{error.strerror or error}", err=True)
            _drop_broken_stdout()
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            sys.exit(ResourceError.exit_code if is_full else ToolkitError.exit_code)


def _show_notes() -> None:
    _LOGGER.setLevel(logging.WARNING)
    if not any(isinstance(handler, _Notes) for handler in _LOGGER.handlers):
        _LOGGER.addHandler(_Notes())


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped


def _is_debugging(program: str) -> bool:
    return os.environ.get(f"{program.upper()}_DEBUG") == "1"


def _where(error: OSError) -> str:
    """The file that an error is about, to stand before it; stdout has no name, but who wrote to it can be seen."""
    if error.filename:
        return f"{printable(str(error.filename))}: "
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    is_echo = last is not None and last.tb_frame.f_code is click.echo.__code__
    return "stdout: " if is_echo and last is not None and last.tb_frame.f_locals.get("file") is sys.stdout else ""


def _drop_broken_stdout() -> None:
    """Python complains once more when it cannot flush stdout at exit, so give it another one."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def json_option(function: F) -> F:
    """``--json``: one JSON document on stdout. Its keys are a promise: they may grow, not change."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(function)


def quiet_option(function: F) -> F:
    """``--quiet``: no progress and no remarks on stderr; errors remain."""

    def hush(_: click.Context, __: click.Parameter, quiet: bool) -> bool:
        if quiet:
            _LOGGER.setLevel(logging.ERROR)
        return quiet

    return click.option("-q", "--quiet", is_flag=True, callback=hush, help="No progress, no remarks on stderr.")(
        function
    )


def print_json(document: Any) -> None:
    """Write one JSON document to stdout, indented for people, stable for scripts."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=True))


def printable(text: str) -> str:
    """Escape everything that could drive a terminal; names in a file may be hostile."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def parse_size(text: str) -> int:
    """Bytes of a size on the command line: ``500M``, ``16G``, ``1.5GiB``; decimal units, unless they have an i.

    Give it to an option as its type.

    Raises:
        click.BadParameter: It is none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(i?)B?", text, re.IGNORECASE | re.ASCII)
    if match is None or (match[3] and not match[2]) or len(text) > 30:
        raise click.BadParameter(f"{text!r:.60} is not a size; write it like 500M, 16G or 1.5GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


@contextmanager
def progress(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """On a terminal, a bar on stderr that is told how many of how many are done; it appears when it is first told."""
    with ExitStack() as shown:
        bars: list[Any] = []

        def watch(done: int, total: int) -> None:
            if not bars and total > 1 and not quiet and sys.stderr is not None and sys.stderr.isatty():
                bar = click.progressbar(length=total, label=label, file=sys.stderr)
                bars.append(shown.enter_context(bar))
            for bar in bars:
                bar.update(done - bar.pos)
            if done == total:
                # What comes next may have a bar of its own.
                shown.close()
                bars.clear()

        yield watch


def counted(count: int, noun: str) -> str:
    """A number and what it counts: ``1 file``, ``1,653 files``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_rate(per_second: float, noun: str) -> str:
    """A rate with three significant digits and no exponent: ``1,940 tokens/s``."""
    return f"{float(f'{per_second:.3g}'):,.0f} {noun}/s" if per_second >= 999.5 else f"{per_second:.3g} {noun}/s"


def format_bytes(count: int | float) -> str:
    """Bytes in decimal units with three significant digits, as disks are sold: ``689 GB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" else 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration in the two largest units that matter: ``12.3 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
