"""What several commands share: their options, the text that they read, and how they talk beside their data.

Knows click and plain text. It must not import torch: `--help` of every command passes here.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from manifests.console import parse_size, printable
from manifests.errors import SourceNotFoundError, ToolkitError

if TYPE_CHECKING:
    import torch

    from runner.loaded import LoadedModel

F = TypeVar("F", bound=Callable[..., Any])

STDIN = "-"


class FileName(click.ParamType):
    """The name of a file, which need not be there; no empty name, and no folder."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take it as it is, or fail as a usage error."""
        text = str(value)
        if not text:
            self.fail("is empty; give the name of a file", param, ctx)
        if os.path.isdir(text):
            self.fail(f"{printable(text)} is a folder; give the name of a file", param, ctx)
        return text


class Number(click.FloatRange):
    """A number in a range, which NaN and infinity are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse, or fail as a usage error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def model_option(function: F) -> F:
    """``-m``: the checkpoint to run."""
    return click.option(
        "-m",
        "--model",
        metavar="PATH",
        help="A resharded checkpoint, a downloaded checkpoint folder or a GGUF file, here or on a web server. Without "
        "it, the embedded demo model.",
    )(function)


def threads_option(function: F) -> F:
    """``--threads``."""
    return click.option(
        "--threads",
        # Beyond some thousands the thread library ends the process.
        type=click.IntRange(1, 512),
        metavar="N",
        help="Threads to compute with. Default: PyTorch's choice.",
    )(function)


def compute_options(function: F) -> F:
    """``--ctx``, ``--threads``, and how a model is opened."""
    return click.option(
        "--ctx",
        type=click.IntRange(min=1),
        metavar="N",
        help="The most tokens that text and answer may have together. Default: what memory and model allow.",
    )(memory_options(threads_option(function)))


def memory_options(function: F) -> F:
    """``--ram``, ``--io``, ``--cache-size``, ``--pin`` and ``--dtype``: how a model is opened; see `as_dtype`."""
    for option in (
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16"]),
            default="float32",
            show_default=True,
            help="What activations are rounded to before each product. bfloat16 reads prompts faster where the "
            "processor has it.",
        ),
        click.option(
            "--pin",
            type=FileName(),
            metavar="TRACE",
            help="Keep the experts in memory that this trace used most, see `runner trace`.",
        ),
        click.option(
            "--cache-size",
            type=parse_size,
            metavar="SIZE",
            help="The most disk that may keep what is fetched from web servers. Default: as much as is needed.",
        ),
        click.option(
            "--io",
            type=click.Choice(["mmap", "direct"]),
            help="How experts come into memory: mapped, so that the system keeps them for the next run too, or read "
            "past its cache. `runner doctor` says which is faster here. Default: mmap where products are compiled.",
        ),
        click.option(
            "--ram",
            type=parse_size,
            metavar="SIZE",
            help="The most memory to take, such as 16G. Default: what the machine has to give.",
        ),
    ):
        function = option(function)
    return function


def speculation_options(function: F) -> F:
    """``--speculate``, ``--draft-tokens`` and ``--mtp-input``: guesses of the MTP layer; the text is the same."""
    for option in (
        mtp_input_option,
        click.option(
            "--draft-tokens",
            type=click.IntRange(1, 16),
            default=1,
            show_default=True,
            metavar="K",
            help="Most tokens that the MTP layer guesses at once.",
        ),
        click.option(
            "--speculate",
            type=click.Choice(["auto", "on", "off"]),
            default="auto",
            show_default=True,
            help="Let the MTP layer guess tokens, and check several in one pass: while it is measured to pay, always, "
            "or never. The text is the same.",
        ),
    ):
        function = option(function)
    return function


def mtp_input_option(function: F) -> F:
    """``--mtp-input``."""
    return click.option(
        "--mtp-input",
        type=click.Choice(["normed", "stream"]),
        default="normed",
        show_default=True,
        help="Which hidden states the MTP layer is given: behind the final norm, or before it.",
    )(function)


def sampling_options(function: F) -> F:
    """How tokens are chosen; every default is the model's own."""
    for option in reversed(
        (
            click.option(
                "--temp",
                "--temperature",
                "temperature",
                type=Number(min=0),
                metavar="T",
                help="Divides the logits; 0 always takes the most likely token.",
            ),
            click.option(
                "--top-k", type=click.IntRange(min=0), metavar="K", help="Keep the K most likely tokens; 0 keeps all."
            ),
            click.option(
                "--top-p",
                type=Number(min=0, max=1, min_open=True),
                metavar="P",
                help="Keep the most likely tokens that together reach this share; 1 keeps all.",
            ),
            click.option(
                "--min-p",
                type=Number(min=0, max=1),
                metavar="P",
                help="Keep tokens at least this many times as likely as the most likely; 0 keeps all.",
            ),
            click.option("--seed", type=int, metavar="N", help="The same seed gives the same text. Default: 0."),
        )
    ):
        function = option(function)
    return function


def echo_generated(piece: str) -> None:
    """Write what a model wrote, at once. On a terminal, control characters but newline and tab are escaped.

    A checkpoint from anywhere could otherwise drive the terminal; a pipe or a file gets the text as it is.
    """
    if sys.stdout.isatty():
        piece = "".join(c if c in "\n\t" or ord(c) >= 0xA0 or " " <= c <= "~" else printable(c) for c in piece)
    # Without color=True click removes escape sequences from what goes into a pipe: it is data there.
    click.echo(piece, nl=False, color=True)


def before_errors(pieces: Iterable[str]) -> Iterator[str]:
    """Pass on pieces that are shown as they come; an error among them begins a line of its own, as Ctrl-C does."""
    last = ""
    try:
        for piece in pieces:
            last = piece
            yield piece
    except Exception:
        if last and not last.endswith("\n"):
            click.echo(err=True)
        raise


def require_stdout() -> None:
    """Refuse to make a text that nobody can get.

    Raises:
        ToolkitError: The caller closed stdout.
    """
    if sys.stdout is None:
        raise ToolkitError("stdout: is closed, and the text goes there; give /dev/null if nobody is to read it")


def require_stdin() -> None:
    """Refuse to read what cannot come.

    Raises:
        ToolkitError: The caller closed stdin.
    """
    if sys.stdin is None:
        raise ToolkitError("stdin: is closed; give it a text, or name a file")


def hides_bar(*, quiet: bool) -> bool | None:
    """What tqdm takes as `disable`: no bar where nobody wants one, nor (None) where stderr is no terminal."""
    return True if quiet or sys.stderr is None else None


def as_dtype(name: str) -> torch.dtype:
    """The dtype that ``--dtype`` names."""
    import torch

    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def set_threads(threads: int | None) -> None:
    """Apply ``--threads``."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def note(text: str, *, quiet: bool) -> None:
    """A remark beside the data."""
    if not quiet:
        click.echo(text, err=True)


def note_idle_sampling(temperature: float, given: dict[str, Any], *, quiet: bool) -> None:
    """Say which sampling options do nothing at temperature 0."""
    used = [name for name, value in given.items() if value is not None and name != "temperature"]
    if temperature == 0 and used:
        idle = " and ".join("--" + name.replace("_", "-") for name in used)
        verb = "does" if len(used) == 1 else "do"
        note(f"note: the temperature is 0, so {idle} {verb} nothing; give --temp to sample", quiet=quiet)


def note_offline(loaded: LoadedModel, *, quiet: bool) -> None:
    """Say that a server did not answer and the cache stands in."""
    if loaded.offline is not None:
        note(f"note: {loaded.offline}; going on with what the cache has of it", quiet=quiet)


def note_fewer_guesses(draft_tokens: int, dtype: str, *, quiet: bool) -> None:
    """Say that ``--dtype bfloat16`` bounds ``--draft-tokens``."""
    if dtype != "float32" and draft_tokens > 1:
        note(f"note: with --dtype {dtype} one token is guessed at a time, so --draft-tokens does nothing", quiet=quiet)


def note_idle_speculation(loaded: LoadedModel, *, quiet: bool) -> None:
    """Say why speculation is off though nobody asked for that."""
    if loaded.idle_speculation is not None:
        note(f"note: speculation is off: {loaded.idle_speculation}", quiet=quiet)


def note_speculation(loaded: LoadedModel, *, quiet: bool) -> None:
    """Say what speculation did."""
    if loaded.speculation is not None:
        note(f"speculation: {loaded.speculation.pace}", quiet=quiet)


def read_text(path: str) -> str:
    """The whole text of a file, or of stdin for ``-``, exactly as it is.

    Raises:
        SourceNotFoundError: There is no such file.
        ToolkitError: It cannot be read, or is not UTF-8; or stdin is closed.
    """
    name = "stdin" if path == STDIN else path
    if path == STDIN:
        require_stdin()
    try:
        raw = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise ToolkitError(f"{path}: cannot be read: {error.strerror}") from error
    return decode_utf8(raw, name)


def decode_utf8(raw: bytes, name: str) -> str:
    """Decode strictly.

    Raises:
        ToolkitError: It is not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ToolkitError(f"{name}: not UTF-8 at byte {error.start}; convert it first") from error
