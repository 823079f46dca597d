"""`runner logits` and `runner eval`: what a model says about a text that is already there.

Arguments in, numbers out. Torch is imported inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manifests.console import counted, format_rate, format_seconds, json_option, print_json, printable, quiet_option
from manifests.errors import SourceNotFoundError, ToolkitError, UnsupportedModelError
from runner.cli_open import open_model
from runner.cli_options import (
    FileName,
    as_dtype,
    hides_bar,
    memory_options,
    model_option,
    note,
    read_text,
    set_threads,
    threads_option,
)
from runner.fetch_progress import showing_fetched
from runner.output import check_output, open_output

if TYPE_CHECKING:
    from torch import Tensor

    from runner.loaded import LoadedModel

EVAL_CTX = 512
"""Window of `eval` when nobody says: what others use too, so that figures can be compared."""

TOP = 5
"""Next tokens that `logits` prints."""


@click.command()
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="The text to read.")
@click.option("--ids", metavar="N,N,...", help="Token ids to read, exactly these: no token is put before them.")
@click.option("--out", type=FileName(), metavar="FILE", help="Write `ids` and `logits` to this .safetensors file.")
@memory_options
@threads_option
@json_option
@quiet_option
def logits(
    model: str | None,
    prompt: str | None,
    ids: str | None,
    out: str | None,
    ram: int | None,
    cache_size: int | None,
    io: str | None,
    pin: str | None,
    dtype: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read a text and give the logits after every position; print the most likely next tokens.

    \b
    Example:
      runner logits -p "import nump"
      runner logits -m DeepSeek-V3-experts --ids 0,671,2 --out logits.safetensors

    The file holds `ids` (int64 [T]) and `logits` (float32 [T, vocabulary]).
    """
    if (prompt is None) == (ids is None):
        raise click.UsageError("give either -p TEXT or --ids N,N,...")
    wanted = [] if ids is None else _parse_ids(ids)
    if out is not None:
        check_output(Path(out))

    set_threads(threads)
    loaded = open_model(
        model, ram=ram, io=io, cache_size=cache_size, pin=pin, dtype=as_dtype(dtype), speculate="off", quiet=quiet
    )
    read = wanted if prompt is None else loaded.text.encode(prompt)
    with showing_fetched(loaded, quiet=quiet):
        if out is None:
            last_V = loaded.engine.last_logits(read)
        else:
            last_V = _save(read, loaded.engine.logit_blocks(read), loaded.model.config.vocab_size, Path(out))
    if out is not None:
        note(f"wrote {out}: ids [{len(read)}], logits [{len(read)}, {len(last_V)}]", quiet=quiet)
    probability, best = last_V.double().softmax(0).topk(min(TOP, len(last_V)))
    top = [
        {"id": token, "token": _token_text(loaded, token), "logit": float(last_V[token]), "probability": share}
        for token, share in zip(best.tolist(), probability.tolist(), strict=True)
    ]
    if as_json:
        document = {"ids": read, "vocab_size": len(last_V), "dtype": dtype, "top": top, "out": out}
        print_json(document)
        return
    for row in top:
        shown = "" if row["token"] is None else repr(row["token"])
        click.echo(f"{row['id']:>7}  {row['probability']:8.3%}  {row['logit']:9.4f}  {shown}".rstrip())


@click.command("eval")
@model_option
@click.option(
    "-f",
    "--file",
    "files",
    type=FileName(),
    multiple=True,
    required=True,
    metavar="FILE",
    help="A text; may be repeated; - is stdin.",
)
@click.option(
    "--ctx",
    type=click.IntRange(min=2),
    default=EVAL_CTX,
    show_default=True,
    metavar="N",
    help="Tokens in a window; windows overlap by one token.",
)
@memory_options
@threads_option
@json_option
@quiet_option
def eval_command(
    model: str | None,
    files: tuple[str, ...],
    ctx: int,
    ram: int | None,
    cache_size: int | None,
    io: str | None,
    pin: str | None,
    dtype: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how well a model predicts texts: perplexity, and bits per byte.

    \b
    Example:
      runner eval -f setup.py
      runner eval -m DeepSeek-V3-experts -f one.txt -f two.txt --ctx 4096 --json

    Every token after the first is predicted exactly once. Each file is a text of its own.
    """
    texts = {path: read_text(path) for path in files}
    for path, text in texts.items():
        if not text:
            raise ToolkitError(f"{path}: empty; there is nothing to predict")
    from tqdm import tqdm

    from runner.evaluate import Evaluation, evaluate, total

    set_threads(threads)
    loaded = open_model(
        model,
        ctx=ctx,
        ram=ram,
        io=io,
        cache_size=cache_size,
        pin=pin,
        dtype=as_dtype(dtype),
        speculate="off",
        quiet=quiet,
    )
    ids = {path: loaded.text.encode(text) for path, text in texts.items()}
    begin = time.perf_counter()
    found: dict[str, Evaluation] = {}
    tokens = sum(max(0, len(one) - 1) for one in ids.values())
    with tqdm(total=tokens, unit="token", leave=False, disable=hides_bar(quiet=quiet), file=sys.stderr) as bar:
        for path, text in texts.items():
            found[path] = evaluate(
                loaded.model, ids[path], ctx=ctx, text_bytes=len(text.encode("utf-8")), on_tokens=bar.update
            )
    seconds = time.perf_counter() - begin
    whole = total(found.values())
    usage = loaded.weights.usage
    if as_json:
        print_json(
            whole.to_document()
            | {
                "ctx": ctx,
                "seconds": seconds,
                "read_bytes": usage.read_bytes,
                "wait_s": usage.wait_s,
                "fetched_bytes": usage.fetched_bytes,
                "fetch_wait_s": usage.fetch_wait_s,
                "resident_bytes": usage.resident_bytes,
                "files": [{"file": path} | one.to_document() for path, one in found.items()],
            }
        )
    else:
        for path, one in found.items():
            click.echo(f"{printable(path)}: {one}")
        if len(found) > 1:
            click.echo(f"all: {whole}")
    speed = f"{counted(tokens, 'token')} in {format_seconds(seconds)} ({format_rate(tokens / seconds, 'tokens')})"
    note(f"{speed}; {usage}", quiet=quiet)


def _parse_ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise click.UsageError(f"--ids takes whole numbers from 0 with commas between them, not {text!r:.80}")
    return [int(part) for part in parts]


def _token_text(loaded: LoadedModel, token: int) -> str | None:
    """What a token spells; None when the checkpoint has no tokenizer, or one of another kind: ids do without."""
    try:
        return loaded.text.decode([token], control_tokens=True)
    except (SourceNotFoundError, UnsupportedModelError):
        return None


def _save(ids: Sequence[int], blocks: Iterator[Tensor], vocab_size: int, path: Path) -> Tensor:
    """Write a .safetensors file as its logits come, see `open_output`; give those of the last position.

    Raises:
        ResourceError: The disk is full.
        ToolkitError: It cannot be written for another reason.
    """
    from manifests.header import HeaderTensor, encode_header

    count = len(ids)
    middle = 8 * count
    end = middle + 4 * count * vocab_size
    tensors = (
        HeaderTensor(name="ids", dtype="I64", shape=(count,), begin=0, end=middle),
        HeaderTensor(name="logits", dtype="F32", shape=(count, vocab_size), begin=middle, end=end),
    )
    last_V: Tensor | None = None
    with open_output(path) as file:
        file.write(encode_header(tensors))
        file.write(struct.pack(f"<{count}q", *ids))
        for block in blocks:
            kept = block.contiguous()
            file.write((ctypes.c_ubyte * kept.nbytes).from_address(kept.data_ptr()))
            last_V = block[-1]
    if last_V is None:
        raise ToolkitError("there is nothing to read: no token was given")
    return last_V
