"""Train the demo model on the CPU and write its checkpoint: `python -m runner.demo.train --minutes 60 --out DIR`.

It knows the schedule, the optimiser and the order of the steps; everything else it takes from its neighbours.

The embedded checkpoint was made by `--minutes 58` with Python 3.11.7 and torch 2.13.0 on two x86-64 cores with AMX,
which other work shared, so the clock ended both parts: 8,785,920 tokens in 2,145 steps (58.0 minutes, 2.6 epochs),
then `settle`, started again from the written weights, 2,846,720 tokens in 695 steps (11.6 minutes). A run on idle
cores sees about twice as many. Text: 700 files, 11,689,814 bytes; held out: 30 files, 426,765 bytes, of which 78,599
are tables of the `encodings` package, which are easy. On the whole held-out text:

    windows of 512 (2048) tokens           float32 weights    as written, FP8
    bits per byte                          1.0843 (1.0693)    1.0847 (1.0695)
    first guess is the next token          0.486 (0.491)      0.486 (0.491)
    MTP names what the model will name     0.669 (0.674)      0.669 (0.674)
    load over mean, least used expert      0.62 (0.61)        0.62 (0.60)
    load over mean, most used expert       1.72 (1.73)        1.71 (1.72)

`runner eval` on the same files gives 1.0882 (each file a text of its own), 1.28 without the `encodings` tables.
Bits per byte before `settle` were 1.0933 (1.0770). No two runs are the same to the bit: the seed is fixed, but the
schedule follows the clock.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from runner.demo import corpus, export
from runner.demo.dataset import Stream, loosen, tokenize, training_starts, windows
from runner.demo.evaluate import evaluate
from runner.demo.network import Network, head_loss
from runner.demo.parts import NetworkConfig
from runner.demo.tokenizer import train_tokenizer

SEED = 1
TOKENS_PER_STEP = 4096
SHORT, LONG = 512, 2048  # window lengths; the long one is the model's whole context
LONG_FROM = 0.7  # share of the training after which windows are long
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
MTP_WEIGHT = 0.3
BALANCE_STEP = 0.02
CHECKPOINT_S = 240.0
WEIGHTS_FILE = "weights.safetensors"

# Without the first, malloc gives every large tensor back and faults each page again at the next step; without the
# second, oneDNN forgets kernels that it will need again. Both are read when the process starts.
_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432:glibc.malloc.hugetlb=1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
}


def _learning_rate(progress: float) -> float:
    """Warm up over 3 %, hold to 50 %, then fall linearly to 2 % of the peak. `progress` runs from 0 to 1."""
    warm = min(1.0, progress / 0.03 + 0.05)
    fall = 1.0 if progress < 0.5 else max(0.02, 1 - (progress - 0.5) / 0.5)
    return LEARNING_RATE * warm * fall


def _batches(stream: Stream, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches [TOKENS_PER_STEP / length, length + 2] for ever."""
    starts = training_starts(stream, length, generator)
    while True:
        yield windows(stream, torch.tensor(list(islice(starts, TOKENS_PER_STEP // length))), length)


def train(
    network: Network, text: Stream, held_out: Stream, *, tokens: int, minutes: float, out: Path, strength: float = 1.0
) -> None:
    """Train until `tokens` are seen or `minutes` have passed, whichever comes first.

    Progress is the larger of the two shares, so the learning rate has always come down at the end. Weights are
    written to `out` now and then, so that a crash loses little. `strength` scales the steps of weights and biases.
    """
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    norms = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-10, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    batches = {length: _batches(text, length, generator) for length in (SHORT, LONG)}
    started = time.monotonic()
    written, seen, step, smooth = started, 0, 0, math.nan
    while True:
        progress = max(seen / tokens, (time.monotonic() - started) / (minutes * 60))
        if progress >= 1:
            break
        ids = next(batches[SHORT if progress < LONG_FROM else LONG])
        hidden, mtp = network(ids[:, :-1])
        loss = head_loss(hidden, network.lm_head, ids[:, 1:-1])
        mtp_loss = head_loss(mtp, network.lm_head, ids[:, 2:])
        (loss + MTP_WEIGHT * mtp_loss).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = strength * _learning_rate(progress)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for moe in network.moe_layers().values():
            moe.balance(strength * BALANCE_STEP * max(1 - progress, 0.05))
        seen, step = seen + TOKENS_PER_STEP, step + 1
        smooth = loss.item() if step == 1 else 0.97 * smooth + 0.03 * loss.item()
        if not math.isfinite(smooth):
            raise ArithmeticError(f"the loss is not a number any more at step {step}: lower LEARNING_RATE")
        if step in (40, 100, 200) or time.monotonic() - written > CHECKPOINT_S:
            written = time.monotonic()
            export.write_weights(out / WEIGHTS_FILE, network)
            biases = [moe.e_score_correction_bias for moe in network.moe_layers().values()]
            click.echo(
                f"{(written - started) / 60:.1f} min, step {step}, {seen / 1e6:.2f} M tokens, "
                f"{seen / len(text.ids):.2f} epochs, {seen / (written - started) / 1e3:.1f} k tokens/s, "
                f"train {smooth:.3f}, bias {min(b.min() for b in biases):.2f} .. {max(b.max() for b in biases):.2f}, "
                f"held out: {evaluate(network, held_out, SHORT, 64)}",
                err=True,
            )
    click.echo(f"{seen:,} tokens in {step} steps, {(time.monotonic() - started) / 60:.1f} minutes")
    export.write_weights(out / WEIGHTS_FILE, network)


def settle(
    network: Network, tokenizer: Tokenizer, text: Stream, held_out: Stream, *, tokens: int, minutes: float, out: Path
) -> None:
    """Train a fifth longer, gently, on text in which some words are cut off the blank before them: see `loosen`."""
    loose = loosen(text, tokenizer, torch.Generator().manual_seed(SEED))
    train(network, loose, held_out, tokens=tokens // 5, minutes=minutes / 5, out=out, strength=0.1)


def finish(network: Network, tokenizer: Tokenizer, held_out: Stream, out: Path) -> None:
    """Write the checkpoint to `out`/model and print the figures of the trained and of the written weights."""
    click.echo(f"float32 weights: {_figures(network, held_out)}")
    folder = out / "model"
    export.write_checkpoint(folder, network, tokenizer)
    export.load_checkpoint(folder, network)
    click.echo(f"as written, FP8: {_figures(network, held_out)}")
    click.echo(f"{sum(file.stat().st_size for file in folder.iterdir()):,} bytes in {folder}")


def _figures(network: Network, held_out: Stream) -> str:
    return "; ".join(f"windows of {length}: {evaluate(network, held_out, length)}" for length in (SHORT, LONG))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder for weights and checkpoint.")
@click.option("--minutes", default=60.0, show_default=True, help="Wall-clock limit; a fifth of it comes on top.")
@click.option("--tokens", default=20_000_000, show_default=True, help="Training length; a fifth of it comes on top.")
def main(out: Path, minutes: float, tokens: int) -> None:
    """Train the demo model and write its checkpoint."""
    if any(os.environ.get(name) != value for name, value in _ENVIRONMENT.items()):
        command = [sys.executable, "-m", "runner.demo.train", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **_ENVIRONMENT})
    if out.exists():
        raise click.BadParameter(f"{out} exists already: give a new folder", param_hint="--out")
    out.mkdir(parents=True)
    torch.manual_seed(SEED)
    config = NetworkConfig()
    training_texts = list(corpus.texts(held_out=False))
    tokenizer = train_tokenizer(training_texts, config.vocab_size)
    text = tokenize(tokenizer, training_texts)
    held_out = tokenize(tokenizer, list(corpus.texts(held_out=True)))
    click.echo(f"{len(text.ids):,} training tokens, {text.text_bytes:,} bytes; held out {held_out.text_bytes:,} bytes")
    network = Network(config)
    train(network, text, held_out, tokens=tokens, minutes=minutes, out=out)
    settle(network, tokenizer, text, held_out, tokens=tokens, minutes=minutes, out=out)
    finish(network, tokenizer, held_out, out)


if __name__ == "__main__":
    main()
