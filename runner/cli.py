"""The command line: the group, `generate` and `doctor`. Arguments in, text or JSON out; no logic of its own.

Whatever needs torch is imported inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click

from manifests.console import Group, json_option, print_json, printable, progress, quiet_option
from runner.cli_bench import bench
from runner.cli_chat import chat
from runner.cli_measure import eval_command, logits
from runner.cli_mtp import mtp
from runner.cli_open import open_model
from runner.cli_options import (
    STDIN,
    FileName,
    as_dtype,
    before_errors,
    compute_options,
    echo_generated,
    model_option,
    note,
    note_fewer_guesses,
    note_idle_sampling,
    note_idle_speculation,
    note_speculation,
    read_text,
    require_stdout,
    sampling_options,
    set_threads,
    speculation_options,
)
from runner.cli_trace import replay, trace
from runner.fetch_progress import until_first


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="expert-reshard", prog_name="runner")
def runner() -> None:
    """Run DeepSeek-style models whose experts stay on disk until a token needs them.

    \b
    Example:
      runner generate -p "def "
      runner chat -m DeepSeek-V3-experts

    Without -m the embedded demo model is used, a small one that completes Python.
    """
    # A model may write any character; a terminal that cannot show one is no reason to stop.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


for command in (chat, logits, eval_command, bench, trace, replay, mtp):
    runner.add_command(command)


@runner.command()
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="The text to continue; - reads stdin.")
@click.option(
    "-f", "--file", "prompt_file", type=FileName(), metavar="FILE", help="A file with the text; - reads stdin."
)
@click.argument("source", required=False, metavar="[-]", type=click.Choice([STDIN]))
@click.option("--system", metavar="TEXT", help="Ask as a chat: this system message, then the prompt as a question.")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="The most tokens to add.",
)
@sampling_options
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@speculation_options
@compute_options
@json_option
@quiet_option
def generate(
    model: str | None,
    prompt: str | None,
    prompt_file: str | None,
    source: str | None,
    system: str | None,
    max_tokens: int,
    stops: tuple[str, ...],
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
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Continue a text. It appears on stdout as it is made; figures come on stderr at the end.

    \b
    Example:
      runner generate -p "import " -n 64
      runner generate -m DeepSeek-V3-experts -f prompt.txt --temp 0.6 --top-p 0.95 --seed 7

    Without --system the prompt is raw: nothing is put around it but the token that begins a text, and the names of
    special tokens in it mean those tokens. With --system it is a question in the model's chat template, and what you
    write stays plain text. Sampling follows the model's generation_config.json where no option is given.
    """
    if not all(stops):
        raise click.UsageError("--stop must not be empty")
    require_stdout()
    written = _read_prompt(prompt, prompt_file, source)

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
    if system is None:
        ids = loaded.text.encode(written)
    else:
        ids = loaded.text.encode_chat([{"role": "system", "content": system}, {"role": "user", "content": written}])
    generation = loaded.start(ids, max_tokens=max_tokens, sampling=sampling, stops=stops)
    text = ""
    pieces = until_first(generation, loaded, quiet=quiet)
    for piece in pieces if as_json else before_errors(pieces):
        text += piece
        if not as_json:
            echo_generated(piece)
    if as_json:
        print_json(
            {
                "text": text,
                "ids": generation.ids,
                "finish_reason": generation.finish_reason,
                "sampling": dataclasses.asdict(sampling),
                "stats": generation.stats.to_document(),
                "speculation": loaded.speculation_document(),
            }
        )
    elif not text.endswith("\n"):
        click.echo()
    if generation.finish_reason == "context":
        note(f"note: stopped because the context of {loaded.ctx} tokens is full; --ctx gives more", quiet=quiet)
    note(str(generation.stats), quiet=quiet)
    note_idle_speculation(loaded, quiet=quiet)
    note_speculation(loaded, quiet=quiet)


@runner.command()
@model_option
@json_option
def doctor(model: str | None, as_json: bool) -> None:
    """Say what is here, what is missing, and whether a model can run.

    \b
    Example:
      runner doctor
      runner doctor -m DeepSeek-V3-experts

    Exit code 0 when it can run, else that of the first problem.
    """
    from runner.doctor import examine

    with progress("headers") as watch:
        report = examine(model, watch)
    if as_json:
        print_json(report.to_document())
    else:
        for line in report.lines():
            click.echo(printable(line))
    if report.problems:
        raise click.exceptions.Exit(report.exit_code)


def _read_prompt(prompt: str | None, prompt_file: str | None, source: str | None) -> str:
    """The prompt from whichever place was named."""
    if sum(place is not None for place in (prompt, prompt_file, source)) != 1:
        raise click.UsageError("give the prompt once: -p TEXT, -f FILE, or - for stdin")
    if prompt is not None and prompt != STDIN:
        return prompt
    return read_text(prompt_file or STDIN)
