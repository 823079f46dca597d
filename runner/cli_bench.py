"""`runner bench`: how fast a model runs here, beside what the machine can do at best.

Arguments in, figures out. Torch is imported inside the command, so that `--help` is instant.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from manifests.console import json_option, printable, quiet_option
from runner.cli_open import open_model
from runner.cli_options import FileName, as_dtype, memory_options, model_option, note, set_threads, threads_option
from runner.fetch_progress import showing_fetched


@click.command()
@model_option
@click.option("--ids", "ids_file", type=FileName(), metavar="FILE", help="A JSON list of token ids. Default: random.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Ids of the prompt."
)
@click.option(
    "-n",
    "--tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    metavar="N",
    help="Ids that follow one by one.",
)
@memory_options
@threads_option
@json_option
@quiet_option
def bench(
    model: str | None,
    ids_file: str | None,
    prompt_tokens: int,
    tokens: int,
    ram: int | None,
    cache_size: int | None,
    io: str | None,
    pin: str | None,
    dtype: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure a model: the first token from a cold start, then one token at a time, with token ids that are given.

    \b
    Example:
      runner bench
      runner bench -m DeepSeek-V3-experts --ids forced.json --ram 32G --json

    Every speed is put beside what the bytes take at this machine's own rates of memory and disk, measured in the same
    run. The last line of stdout is one JSON document. The experts' files are put out of the system's cache first;
    with --pin, those of the trace are in memory before the first token.
    """
    from runner.bench import read_ids, run

    ids = None if ids_file is None else read_ids(Path(ids_file))
    if ids is not None and len(ids) < prompt_tokens + tokens:
        raise click.UsageError(
            f"{printable(str(ids_file))}: has {len(ids)} ids, and --prompt-tokens {prompt_tokens} and -n {tokens} take "
            f"{prompt_tokens + tokens}; give a longer list, or smaller numbers"
        )
    set_threads(threads)
    begin = time.perf_counter()
    result = run(
        model,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        ids=ids,
        open_model=lambda: open_model(
            model,
            ctx=prompt_tokens + tokens,
            ram=ram,
            io=io,
            cache_size=cache_size,
            pin=pin,
            dtype=as_dtype(dtype),
            speculate="off",
            quiet=quiet,
        ),
        showing=lambda loaded: showing_fetched(loaded, quiet=quiet),
        say=lambda what: note(f"{time.perf_counter() - begin:6.1f} s  {what}", quiet=quiet),
    )
    if not as_json:
        for line in result.lines():
            click.echo(printable(line))
    click.echo(json.dumps(result.to_document()))
