"""`runner trace` and `runner replay`: record which experts a run used, and how well policies would have kept them.

Arguments in, a file or numbers out. Torch is imported inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manifests.console import counted, json_option, parse_size, print_json, printable, quiet_option
from manifests.errors import ToolkitError
from runner.cli_open import open_model
from runner.cli_options import (
    FileName,
    as_dtype,
    compute_options,
    hides_bar,
    model_option,
    note,
    read_text,
    set_threads,
)
from runner.fetch_progress import showing_fetched
from runner.output import check_output

if TYPE_CHECKING:
    from runner.replay import Replay
    from runner.trace import Trace


@click.command()
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="The text to continue.")
@click.option("-f", "--file", "prompt_file", type=FileName(), metavar="FILE", help="A file with the text; - is stdin.")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="The most tokens to add.",
)
@click.option("--out", required=True, type=FileName(), metavar="FILE", help="Where to write the trace.")
@compute_options
@json_option
@quiet_option
def trace(
    model: str | None,
    prompt: str | None,
    prompt_file: str | None,
    max_tokens: int,
    out: str,
    ctx: int | None,
    ram: int | None,
    cache_size: int | None,
    io: str | None,
    pin: str | None,
    dtype: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue a text and write down which experts each pass used, for `replay` and for pinning.

    \b
    Example:
      runner trace -p "import " -n 256 --out trace.json
      runner trace -m DeepSeek-V3-experts -f prompt.txt --out trace.json

    The text itself is not printed. Sampling follows the model's generation_config.json.
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give either -p TEXT or -f FILE")
    path = Path(out)
    check_output(path)
    text = prompt if prompt is not None else read_text(str(prompt_file))
    from runner.trace import TraceRecorder, save

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
    config = loaded.model.config
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    if not layers:
        raise ToolkitError(f"{loaded.name}: has no MoE layer; there is no routing to trace")
    ids = loaded.text.encode(text)
    recorder = TraceRecorder(
        model_type=config.model_type,
        layers=layers,
        experts=config.n_routed_experts,
        experts_per_token=config.num_experts_per_tok,
    )
    # The engine and not a Generation, which is an observer itself. A full context holds one token more than it reads.
    tokens = loaded.engine.generate(
        ids,
        max_tokens=min(max_tokens, loaded.ctx - len(ids) + 1),
        sampling=loaded.sampling(),
        eos_ids=loaded.text.eos_ids,
    )
    loaded.model.observer = recorder.observe
    with showing_fetched(loaded, quiet=quiet):
        generated = sum(1 for _ in tokens)
    found = recorder.trace()
    save(found, path)
    used = {layer: len(counts) for layer, counts in found.usage.items()}
    if as_json:
        print_json(
            {
                "out": out,
                "prompt_tokens": len(ids),
                "generated_tokens": generated,
                "passes": len(found.passes),
                "experts_used": {str(layer): count for layer, count in used.items()},
            }
        )
    passes = "1 pass" if len(found.passes) == 1 else f"{len(found.passes):,} passes"
    prompt = counted(len(ids), "prompt token")
    note(
        f"wrote {printable(out)}: {passes} for {prompt} and {generated} generated; "
        f"{sum(used.values())} of {len(found.layers) * found.experts} experts used",
        quiet=quiet,
    )


@click.command()
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@click.option("--experts-in-memory", metavar="N,N,...", help="Windows: experts of all layers that fit into memory.")
@click.option("--ram", type=parse_size, metavar="SIZE", help="The window in bytes, such as 16G; needs --expert-bytes.")
@click.option("--expert-bytes", type=parse_size, metavar="SIZE", help="Bytes of one expert, such as 44050944.")
@json_option
@quiet_option
def replay(
    traces: tuple[str, ...],
    experts_in_memory: str | None,
    ram: int | None,
    expert_bytes: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Count how many uses of experts would have found theirs in memory, by policy and size of memory.

    \b
    Example:
      runner replay trace.json
      runner replay one.json two.json --experts-in-memory 64,128
      runner replay trace.json --ram 16G --expert-bytes 44050944

    Traces run one after the other; what is in memory stays there. Without a window, shares of all experts are taken.
    Passes of one token are decode, the others prefill. lru drops what was unused for longest; lfu counts uses, and
    lrfu counts them with a half life in passes. The optimum knows the future: no policy can beat it.
    """
    windows = _windows(experts_in_memory, ram, expert_bytes)
    from tqdm import tqdm

    from runner import replay as replays
    from runner.trace import load

    found: list[Trace] = [load(Path(path)) for path in traces]
    runs = len(replays.policy_names()) * (len(replays.SHARES) if windows is None else len(windows))
    with tqdm(total=runs, leave=False, disable=hides_bar(quiet=quiet), file=sys.stderr) as bar:
        result = replays.replay(found, windows, on_run=bar.update)
    if as_json:
        print_json({"traces": list(traces)} | result.to_document())
        return
    for line in _table(result):
        click.echo(line)


def _windows(experts: str | None, ram: int | None, expert_bytes: int | None) -> list[int] | None:
    """The windows that were asked for; None where nobody asked."""
    if experts is not None and ram is not None:
        raise click.UsageError("give either --experts-in-memory or --ram")
    if (ram is None) != (expert_bytes is None):
        raise click.UsageError("--ram and --expert-bytes are needed together")
    if experts is not None:
        parts = [part.strip() for part in experts.split(",")]
        if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) for part in parts):
            raise click.UsageError(
                f"--experts-in-memory takes whole numbers from 1 with commas between them, not {experts!r:.80}"
            )
        return list(dict.fromkeys(int(part) for part in parts))
    if ram is None or expert_bytes is None:
        return None
    if not expert_bytes:
        raise click.UsageError("--expert-bytes must be more than 0")
    if not (window := ram // expert_bytes):
        raise click.UsageError("--ram is less than one expert")
    return [window]


def _table(result: Replay) -> list[str]:
    """For people: the hit rate of every policy and window, decode and prefill apart."""
    lines = []
    for phase, passes in (("decode", result.decode_passes), ("prefill", result.prefill_passes)):
        if not passes:
            continue
        lines.append(f"{phase}, hit rate over {passes:,} passes" if passes > 1 else f"{phase}, hit rate over 1 pass")
        names = list(next(iter(result.windows.values())))
        lines.append(f"{'experts in memory':>24}" + "".join(f"{name:>10}" for name in names))
        for window, policies in result.windows.items():
            rates = [getattr(one, phase).hit_rate or 0 for one in policies.values()]
            part = "all" if window > result.experts else f"{window / result.experts:.1%}"
            share = f"{window:,} ({part})"
            lines.append(f"{share:>24}" + "".join(f"{rate:>10.1%}" for rate in rates))
    return lines
