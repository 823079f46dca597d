"""`runner mtp`: what a checkpoint has of the MTP layer, how often it guesses right, and where that pays."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from manifests.console import format_bytes, json_option, print_json, printable, progress, quiet_option
from manifests.errors import ToolkitError
from runner.cli_open import note_idle_cache_size
from runner.cli_options import (
    FileName,
    as_dtype,
    hides_bar,
    memory_options,
    model_option,
    mtp_input_option,
    note,
    note_fewer_guesses,
    note_offline,
    read_text,
    set_threads,
    threads_option,
)

if TYPE_CHECKING:
    from runner.acceptance import Counts
    from runner.loaded import LoadedModel
    from runner.mtp_parts import MtpParts

_PROMPT_TOKENS = 64


@click.command()
@model_option
@click.option("-f", "--file", type=FileName(), metavar="FILE", help="A text to measure acceptance on; - is stdin.")
@click.option(
    "-n",
    "--tokens",
    type=click.IntRange(min=16),
    default=1024,
    show_default=True,
    metavar="N",
    help="About as many positions are measured in each way.",
)
@click.option(
    "--draft-tokens",
    type=click.IntRange(1, 16),
    default=3,
    show_default=True,
    metavar="K",
    help="Guesses in a row.",
)
@mtp_input_option
@memory_options
@threads_option
@json_option
@quiet_option
def mtp(
    model: str | None,
    file: str | None,
    tokens: int,
    draft_tokens: int,
    mtp_input: Any,
    ram: int | None,
    cache_size: int | None,
    io: str | None,
    pin: str | None,
    dtype: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what there is of the multi-token-prediction (MTP) layer, and what it can do.

    \b
    Example:
      runner mtp -m DeepSeek-V3-experts
      runner mtp -f setup.py --draft-tokens 2

    Without -f only descriptions are read. With it the layer guesses at every position of the text, and behind parts of
    it as in use; then bytes say above which share of right guesses speculation pays here.

    Exit code 0 when the layer can be run, 14 when not.
    """
    from runner.loaded import LoadedModel
    from runner.mtp_parts import MtpParts
    from runner.opening import config_of, open_checkpoint

    text = None if file is None else read_text(file)
    note_idle_cache_size(model, cache_size, quiet=quiet)
    with progress("headers", quiet=quiet) as watch:
        checkpoint = open_checkpoint(model, cache_size, watch)
    parts = MtpParts(checkpoint, config_of(checkpoint))
    document: dict[str, Any] = parts.to_document()
    if not as_json:
        for line in _inventory(parts):
            click.echo(printable(line))
    if text is not None and parts.fault is None:
        set_threads(threads)
        loaded = LoadedModel(
            model,
            ram=ram,
            io=io,
            cache_size=cache_size,
            pin=pin,
            dtype=as_dtype(dtype),
            speculate="on",
            draft_tokens=draft_tokens,
            mtp_input=mtp_input,
        )
        note_offline(loaded, quiet=quiet)
        note_fewer_guesses(draft_tokens, dtype, quiet=quiet)
        document |= _measure(loaded, text, tokens, mtp_input, as_json=as_json, quiet=quiet)
    if as_json:
        print_json(document)
    if parts.fault is not None:
        raise click.exceptions.Exit(14)


def _inventory(parts: MtpParts) -> Iterator[str]:
    sizes = parts.bytes_by_kind
    found = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in sizes.items())
    yield f"layer      {parts.layer}: {len(parts.sizes)} tensors, {format_bytes(sum(sizes.values()))} ({found})"
    for copy in parts.copies:
        used = "" if copy.used == copy.name else ", which is used instead"
        what = "no copy of" if copy.state == "absent" else f"{copy.state} to" if copy.state == "equal" else copy.state
        beside = " beside" if copy.state in ("different", "unknown") else ""
        yield f"copy       {copy.name}: {what}{beside} {copy.original}{used}"
    yield f"can run    {'yes' if parts.fault is None else f'no: {parts.fault}'}"


def _measure(loaded: LoadedModel, text: str, tokens: int, takes: Any, *, as_json: bool, quiet: bool) -> dict[str, Any]:
    from tqdm import tqdm

    from runner.acceptance import Counts, Neighbours, beginnings, continued, teacher_forced

    assert loaded.mtp_module is not None
    assert loaded.speculation is not None
    places, ids = loaded.draft_tokens, loaded.text.encode(text)
    window = min(len(ids), loaded.ctx - places, loaded.budget.pass_tokens, tokens)
    if window < 4:
        raise ToolkitError(
            "the text, or the model's context, is too short to measure acceptance on; give a longer text"
        )
    forced, free, neighbours = Counts.zeros(places), Counts.zeros(places), Neighbours(1 + places)
    bos = ids[:1] if loaded.text.add_bos else []
    prompt = min(_PROMPT_TOKENS, window - len(bos))
    parts = [[*bos, *part] for part in beginnings(ids[len(bos) :], prompt, max(1, tokens // (2 * _PROMPT_TOKENS)))]
    each = max(1, tokens // len(parts))
    with tqdm(total=window + each * len(parts), leave=False, disable=hides_bar(quiet=quiet), file=sys.stderr) as bar:
        loaded.model.observer = neighbours.observe
        for place, guess, chosen in teacher_forced(loaded.model, loaded.mtp_module, ids[:window], places, takes=takes):
            forced.add(place, guess == chosen)
            bar.update(place == 0)
        loaded.model.observer = None
        for part in parts:
            room = min(each, loaded.ctx - len(part) + 1)
            continued(
                loaded.engine,
                loaded.speculation.pace,
                part,
                tokens=room,
                eos_ids=tuple(loaded.text.eos_ids),
                count=free,
            )
            bar.update(room)
    if not as_json:
        for line in _acceptance(forced, free):
            click.echo(line)
    note("now the rates of memory and disk", quiet=quiet)
    gains = _gains(loaded, places, free, neighbours.mean)
    if not as_json:
        for line in map(_gain, gains):
            click.echo(line)
        if not gains:
            click.echo("pays       unknown: memory or disk could not be measured")
    return {
        "teacher_forced": {"acceptance": forced.rates, "guesses": forced.tried},
        "free_running": {"acceptance": free.rates, "guesses": free.tried},
        "experts_of_neighbours": neighbours.mean,
        "gains": gains,
    }


def _acceptance(forced: Counts, free: Counts) -> Iterator[str]:
    yield "guess      right behind a right one, written freely; at each place of the text"
    for place, (mine, taught) in enumerate(zip(free.rates, forced.rates, strict=True)):
        shown = ["none" if rate is None else f"{rate:.3f}" for rate in (mine, taught)]
        yield f"{place + 1:<10} {shown[0]} of {free.tried[place]:,}; {shown[1]} of {forced.tried[place]:,}"


def _gains(loaded: LoadedModel, places: int, free: Counts, union: float | None) -> list[dict[str, Any]]:
    """What bytes take here with everything in memory, and with a quarter of the experts; nothing where it is unknown.

    Args:
        loaded: The model.
        places: Most guesses of a pass.
        free: How often they were right.
        union: Experts that a token and so many behind it chose together.
    """
    from runner import breakeven, floors
    from runner.sizes import mtp_costs, routed_experts

    config = loaded.model.config
    costs = mtp_costs(loaded.contents, config, loaded.mtp)
    memory = floors.memory_read_gbps(loaded.weights.dense_tensors())
    disk = floors.disk_read_gbps(loaded.contents, routed_experts(config, has_mtp=True))
    if not memory or not disk:
        return []
    alone = costs.distinct(1 + places) - costs.top
    share = 1.0 if union is None or not alone else (union - costs.top) / alone

    def distinct(rows: float) -> float:
        return costs.top + share * (costs.distinct(rows) - costs.top)

    found = []
    for hits in (1.0, 0.25):
        machine = breakeven.Machine(memory=memory, disk=disk, hits=hits)
        for guesses in range(1, places + 1):
            tokens, gain = free.tokens(guesses), None
            if tokens is not None:
                gain = breakeven.gain(costs, machine, tokens=tokens, guesses=guesses, distinct=distinct)
            document = breakeven.to_document(costs, machine, guesses=guesses, distinct=distinct)
            found.append(document | {"tokens_per_pass": tokens, "speedup": gain})
    return found


def _gain(found: dict[str, Any]) -> str:
    where = "everything in memory" if found["hits"] == 1 else f"{found['hits']:.0%} of the experts in memory"
    least = found["break_even_acceptance"]
    pays = "never pays" if least is None else f"pays above {least:.2f}"
    at = ""
    if found["speedup"] is not None:
        at = f"; {found['speedup']:.2f} times as fast with {found['tokens_per_pass']:.2f} tokens a pass"
    return f"pays       {where}, {found['guesses']} at a time: {pays}{at}"
