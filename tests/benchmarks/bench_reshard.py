"""How fast `reshard run` is, beside what the disk can do at best, `cp`, and the way before.

    python tests/benchmarks/bench_reshard.py --dir SCRATCH [--gb 8.6] [--rounds 3]
    python tests/benchmarks/bench_reshard.py --dir SCRATCH --consume

Makes a checkpoint of DeepSeek-V3's tensors at their real widths, random bytes throughout, and moves it with a raw
pipelined O_DIRECT copy, with `cp` and `sync`, and with `reshard run`, in turns: a shared disk changes its mind within
minutes, so only ratios within a round mean anything. The source is never in the page cache; every way ends with its
bytes fsynced. `verify`, `restore --check` and the naive way are measured once.

With --consume it measures instead the most disk that `reshard run --consume` and `restore --consume` take beyond what
was there, and puts it beside what `reshard plan` said.

A table goes to stderr; the last line of stdout is one JSON document. What it made is removed, whatever happens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from consume_peak import measure_consume
from dense import write_dense
from layouts import deepseek_v3_part
from measure import CommandError, Measured, run
from report import HEADING, finish, say, say_measured
from scratch import evict, remove, workspace

HERE = Path(__file__).resolve().parent
RAW_TARGET = 0.85
CP_TARGET = 1.2
MEMORY_TARGET_BYTES = 300_000_000

COPY_AND_SYNC = 'mkdir "$2" && cp "$1"/* "$2" && sync "$2"/*'


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description="Measure reshard on the disk of a folder.")
    parser.add_argument("--dir", type=Path, required=True, help="folder on the disk to measure; needs twice the size")
    parser.add_argument("--gb", type=float, default=8.6, help="size of the checkpoint (default 8.6)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured (default 3)")
    parser.add_argument("--consume", action="store_true", help="measure the peak of extra disk instead of time")
    options = parser.parse_args()
    layout = deepseek_v3_part(int(options.gb * 1e9))
    try:
        with workspace(options.dir, 2 * layout.size + (1 << 30)) as folder:
            say(f"making {layout.size / 1e9:.2f} GB in {len(layout.shards)} shards, {layout.tensor_count:,} tensors")
            source = folder / "source"
            source.mkdir()
            write_dense(source, layout)
            if options.consume:
                finish("reshard --consume", measure_consume(layout, source, folder / "out", folder / "back"))
            else:
                finish("reshard", measure_speed(layout.size, source, folder / "out", rounds=options.rounds))
    except CommandError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        say("interrupted; what was made is removed")
        return 130
    return 0


def measure_speed(size: int, source: Path, out: Path, *, rounds: int) -> dict[str, Any]:
    """All ways in turns, then what is measured once."""
    ways: dict[str, list[str | Path]] = {
        "raw": [sys.executable, HERE / "raw_copy.py", source, out],
        "cp": ["sh", "-c", COPY_AND_SYNC, "sh", source, out],
        "reshard": [sys.executable, "-m", "reshard", "run", source, out, "--json", "-q"],
    }
    taken: dict[str, list[Measured]] = {way: [] for way in ways}
    say(HEADING)
    for number in range(rounds):
        # Nobody is always the first after a pause, and reshard is the last of all: its output is needed below.
        order = list(ways) if (rounds - number) % 2 else list(reversed(ways))
        for way in order:
            taken[way].append(_measure(f"round {number + 1}: {way}", ways[way], size, source, out))
    once = {}
    for name, command in (("verify", ["verify", out]), ("restore_check", ["restore", out, "--check"])):
        evict(out)
        once[name] = run([sys.executable, "-m", "reshard", *command, "--json", "-q"], folder=out.parent)
        say_measured(name, once[name], size)
    naive = [sys.executable, HERE / "naive.py", source, out]
    once["naive"] = _measure("naive: load_file, save_file", naive, size, source, out)
    remove(out)
    result: dict[str, Any] = {"bytes": size, "rounds": rounds}
    result |= {way: _describe(runs, size) for way, runs in taken.items()}
    result |= {name: measured.over(size) for name, measured in once.items()}
    for other, target in (("raw", RAW_TARGET), ("cp", CP_TARGET)):
        pairs = zip(taken[other], taken["reshard"], strict=True)
        ratios = [theirs.seconds / ours.seconds for theirs, ours in pairs]
        result[f"ratio_{other}"] = round(statistics.median(ratios), 3)
        result[f"ratio_{other}_rounds"] = [round(ratio, 3) for ratio in ratios]
        result[f"ratio_{other}_target"] = target
        say(f"reshard is {result[f'ratio_{other}']:.2f} x as fast as {other} (target {target})")
    result["peak_bytes_target"] = MEMORY_TARGET_BYTES
    return result


def _measure(label: str, command: list[str | Path], size: int, source: Path, out: Path) -> Measured:
    remove(out)
    evict(source)
    measured = run(command, folder=out.parent)
    say_measured(label, measured, size)
    return measured


def _describe(runs: list[Measured], size: int) -> dict[str, Any]:
    """Medians, the highest peak, and all runs."""
    figures = [measured.over(size) for measured in runs]
    medians = {key: round(statistics.median(each[key] for each in figures), 3) for key in figures[0]}
    return medians | {"peak_bytes": max(measured.peak_bytes for measured in runs), "runs": figures}


if __name__ == "__main__":
    sys.exit(main())
