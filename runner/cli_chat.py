"""`runner chat`: turns with the model's own template, on a terminal or from a pipe.

Knows the terminal and joins it with conversation and model. It must not know the template's form.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Any

import click

from manifests.console import Stopped, quiet_option
from manifests.errors import ToolkitError
from runner.cli_open import open_model
from runner.cli_options import (
    as_dtype,
    before_errors,
    compute_options,
    decode_utf8,
    echo_generated,
    model_option,
    note,
    note_fewer_guesses,
    note_idle_sampling,
    note_idle_speculation,
    note_speculation,
    require_stdin,
    require_stdout,
    sampling_options,
    set_threads,
    speculation_options,
)
from runner.fetch_progress import until_first

if TYPE_CHECKING:
    from runner.conversation import Conversation
    from runner.loaded import LoadedModel
    from runner.sampling import SamplingParams

HELP = """/help    this list
/reset   forget the conversation
/exit    leave (so does Ctrl-D)
Ctrl-C   stop the answer; what was said of it stays in the conversation"""


@click.command()
@model_option
@click.option("--system", metavar="TEXT", help="A system message before the conversation.")
@click.option("--thinking", is_flag=True, help="Let the model think first, where its template has that switch (V3.1).")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="The most tokens in an answer.",
)
@sampling_options
@speculation_options
@compute_options
@quiet_option
def chat(
    model: str | None,
    system: str | None,
    thinking: bool,
    max_tokens: int,
    speculate: Any,
    draft_tokens: int,
    mtp_input: Any,
    ctx: int | None,
    ram: int | None,
    cache_size: int | None,
    io: str | None,
    pin: str | None,
    dtype: str,
    threads: int | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Talk with a model in turns. From a pipe, every line is a turn.

    \b
    Example:
      runner chat -m DeepSeek-V3-experts --system "Answer in one sentence."
      printf 'What is an expert?\\nAnd a router?\\n' | runner chat -m DeepSeek-V3-experts -q

    Special tokens that you write stay plain text. The cache is kept between turns.

    \b
    /help    lists these
    /reset   forgets the conversation
    /exit    leaves; so does Ctrl-D
    Ctrl-C   stops the answer; what was said of it stays in the conversation
    """
    require_stdin()
    require_stdout()
    from runner.conversation import Conversation

    set_threads(threads)
    loaded = open_model(
        model,
        ctx=ctx,
        ram=ram,
        io=io,
        cache_size=cache_size,
        pin=pin,
        dtype=as_dtype(dtype),
        speculate=speculate,
        draft_tokens=draft_tokens,
        mtp_input=mtp_input,
        quiet=quiet,
    )
    sampling = loaded.sampling(**given)
    note_idle_sampling(sampling.temperature, given, quiet=quiet)
    note_fewer_guesses(draft_tokens, dtype, quiet=quiet)
    note_idle_speculation(loaded, quiet=quiet)
    conversation = Conversation(loaded.text, system=system, thinking=thinking)
    conversation.ask("")  # a model without a usable template is refused before the first turn
    if thinking and loaded.text.template is not None and not loaded.text.template.has_thinking:
        note("note: this model's template has no such switch, so --thinking does nothing", quiet=quiet)
    terminal = _Terminal()
    if terminal.interactive:
        note(f"{loaded.name}: /help lists commands", quiet=quiet)
    while (line := terminal.read()) is not None:
        match line.strip():
            case "":
                pass
            case "/exit":
                return
            case "/help":
                click.echo(HELP, err=True)
            case "/reset":
                conversation.reset()
                note("the conversation is forgotten", quiet=quiet)
            case _:
                try:
                    _take_turn(
                        line,
                        loaded,
                        conversation,
                        sampling,
                        max_tokens=max_tokens,
                        interactive=terminal.interactive,
                        quiet=quiet,
                    )
                except ToolkitError as error:
                    # Somebody who types wants to go on, with /reset for example; a script wants to know.
                    if not terminal.interactive:
                        raise
                    click.echo(f"runner: {error}", err=True)
                except KeyboardInterrupt as interrupt:
                    # Just before or after the answer, where nothing is left to stop.
                    if not terminal.interactive or isinstance(interrupt, Stopped):
                        raise
                    click.echo(err=True)


def _take_turn(
    line: str,
    loaded: LoadedModel,
    conversation: Conversation,
    sampling: SamplingParams,
    *,
    max_tokens: int,
    interactive: bool,
    quiet: bool,
) -> None:
    turn = conversation.ask(line)
    generation = loaded.start(turn.ids, max_tokens=max_tokens, sampling=sampling)
    interrupted = False
    try:
        for piece in before_errors(until_first(generation, loaded, quiet=quiet)):
            echo_generated(piece)
    except KeyboardInterrupt as interrupt:
        if not interactive or isinstance(interrupt, Stopped):
            raise
        interrupted = True
    click.echo()
    # A question that was stopped before its answer began was not asked.
    if generation.ids or not interrupted:
        conversation.answered(turn, generation.ids)
    if generation.finish_reason == "context":
        note(f"note: the context of {loaded.ctx} tokens is full; /reset begins anew, --ctx gives more", quiet=quiet)
    note(str(generation.stats), quiet=quiet)
    note_speculation(loaded, quiet=quiet)


class _Terminal:
    """Reads turns: with line editing where both ends are a terminal, else line by line."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._editing = self.interactive and sys.stdout.isatty()
        if self._editing:
            # Importing it is what gives input() its line editing; Windows has none.
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")

    def read(self) -> str | None:
        """The next line without its end, or None at the end of the input."""
        while True:
            try:
                if self._editing:
                    return input("> ")
                if self.interactive:
                    click.echo("> ", nl=False, err=True)
                raw = sys.stdin.buffer.readline()
                return decode_utf8(raw, "stdin").rstrip("\r\n") if raw else None
            except EOFError:
                click.echo(err=True)
                return None
            except KeyboardInterrupt as interrupt:
                if not self.interactive or isinstance(interrupt, Stopped):
                    raise
                click.echo("\n(/exit leaves)", err=True)
