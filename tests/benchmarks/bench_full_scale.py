"""The whole of DeepSeek-V3 or Kimi-K2, rehearsed: every header and every byte, most of them holes.

    python tests/benchmarks/bench_full_scale.py --dir SCRATCH [--layout v3|kimi-k2] [--shards N]

Builds the published layout as sparse files with random patches, and runs `plan`, `run`, `verify` and `restore` on it.
Then it compares, with its own eyes: every tensor in the files that were written against its place in the source, and
every restored shard against the original, holes included. Reading holes costs no disk, hashing them does take time:
689 GB twice is about twelve minutes on two cores.

A table goes to stderr; the last line of stdout is one JSON document. What it made is removed, whatever happens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from layouts import Layout, deepseek_v3, deepseek_v3_first, kimi_k2
from measure import CommandError, Measured, run
from report import HEADING, finish, say, say_measured
from scratch import workspace
from sparse import allocated_bytes, first_difference, first_difference_in, write_sparse

from manifests.header import read_header
from manifests.paths import MANIFEST_NAME


def main() -> int:
    """Rehearse one layout."""
    parser = argparse.ArgumentParser(description="Rehearse reshard on a full-size layout of sparse files.")
    parser.add_argument("--dir", type=Path, required=True, help="folder whose file system has holes")
    parser.add_argument("--layout", choices=("v3", "kimi-k2"), default="v3", help="which model (default v3)")
    parser.add_argument("--shards", type=int, help="only the first so many shards")
    parser.add_argument("--random-gb", type=float, default=1.0, help="bytes that are no holes (default 1)")
    options = parser.parse_args()
    if options.shards is not None and options.shards < 1:
        parser.error("--shards must be at least 1")
    random_bytes = int(options.random_gb * 1e9)
    try:
        # Patches are whole pages in the source and lie anywhere in the output: there they touch a page more each.
        with workspace(options.dir, 6 * random_bytes + (1 << 30)) as folder:
            layout = make_layout(options.layout, options.shards)
            finish(f"full scale: {options.layout}", rehearse(layout, folder, random_bytes))
    except CommandError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        say("interrupted; what was made is removed")
        return 130
    return 0


def make_layout(name: str, shards: int | None) -> Layout:
    """The whole layout, or its first shards."""
    if name == "kimi-k2":
        return kimi_k2() if shards is None else kimi_k2(shards)
    return deepseek_v3() if shards is None else deepseek_v3_first(shards)


def rehearse(layout: Layout, folder: Path, random_bytes: int) -> dict[str, Any]:
    """All commands, then all comparisons.

    Raises:
        SystemExit: A comparison failed.
    """
    source, out, back = folder / "source", folder / "out", folder / "back"
    source.mkdir()
    begin = time.perf_counter()
    write_sparse(source, layout, random_bytes=random_bytes)
    made = time.perf_counter() - begin
    say(f"{layout.size:,} bytes in {len(layout.shards)} shards, {layout.tensor_count:,} tensors, made in {made:.1f} s")
    say(HEADING)
    result: dict[str, Any] = {"bytes": layout.size, "tensors": layout.tensor_count, "shards": len(layout.shards)}
    measured = {}
    for name, arguments in (
        ("plan", ["plan", source, out]),
        ("run", ["run", source, out, "-q"]),
        ("verify", ["verify", out, "-q"]),
        ("restore", ["restore", out, back, "-q"]),
    ):
        measured[name] = run([sys.executable, "-m", "reshard", *arguments, "--json"], folder=folder)
        say_measured(name, measured[name], layout.size)
        result[name] = measured[name].over(layout.size)
    result["load"] = _measure_load(out)
    result["files"] = len([path for path in out.rglob("*") if path.is_file()])
    result["manifest_bytes"] = (out / MANIFEST_NAME).stat().st_size
    _check_said(layout, out, measured)
    begin = time.perf_counter()
    result["tensors_compared"] = compare_tensors(layout, source, out)
    result["shards_compared"] = compare_shards(layout, source, back)
    say(
        f"compared {result['tensors_compared']:,} tensors and {result['shards_compared']} restored shards with the "
        f"source, holes included, in {time.perf_counter() - begin:.1f} s: all equal"
    )
    say(f"files {result['files']:,}; manifest {result['manifest_bytes']:,} bytes; {_load_line(result['load'])}")
    result["allocated_bytes"] = {path.name: allocated_bytes(path) for path in (source, out, back)}
    say("on disk: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in result["allocated_bytes"].items()))
    return result


def compare_tensors(layout: Layout, source: Path, out: Path) -> int:
    """Every tensor as the stock library would find it in the written files, against its place in the source.

    Raises:
        SystemExit: One is missing, differs, or is described differently.
    """
    places = {
        tensor.name: (shard, tensor, len(shard.header) + tensor.begin)
        for shard in layout.shards
        for tensor in shard.tensors
    }
    sources = {shard.name: os.open(source / shard.name, os.O_RDONLY) for shard in layout.shards}
    compared = 0
    try:
        for path in sorted(out.rglob("*.safetensors")):
            header = read_header(path)
            with path.open("rb") as file:
                for found in header.tensors:
                    if found.name not in places:
                        sys.exit(f"{path}: {found.name} is not in the source, or in two files")
                    shard, tensor, offset = places.pop(found.name)
                    size = tensor.end - tensor.begin
                    is_same = (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                    at = len(header.raw) + found.begin
                    if not is_same or (
                        first_difference_in(file.fileno(), at, sources[shard.name], offset, size) is not None
                    ):
                        sys.exit(f"{path}: {found.name} is not the tensor of that name in {shard.name}")
                    compared += 1
    finally:
        for descriptor in sources.values():
            os.close(descriptor)
    if places:
        sys.exit(f"{out}: has no {next(iter(places))}, nor {len(places) - 1} more tensors of the source")
    return compared


def compare_shards(layout: Layout, source: Path, back: Path) -> int:
    """Every file of the source against the restored one.

    Raises:
        SystemExit: One is missing or differs.
    """
    for path in source.iterdir():
        restored = back / path.name
        if not restored.exists():
            sys.exit(f"{restored}: was not restored")
        if (at := first_difference(path, restored)) is not None:
            sys.exit(f"{restored}: differs from the source from byte {at} on")
    return len(layout.shards)


def _check_said(layout: Layout, out: Path, measured: dict[str, Measured]) -> None:
    """What the commands say of themselves: nothing damaged, and every shard has the sha256 that the manifest has."""
    if not measured["verify"].last_json["ok"]:
        sys.exit(f"{out}: verify found damage: {measured['verify'].out[:1000]}")
    manifest = json.loads((out / MANIFEST_NAME).read_bytes())
    recorded = {shard["name"]: (shard["size"], shard["sha256"]) for shard in manifest["source"]["shards"]}
    restored = {shard["name"]: (shard["size"], shard["sha256"]) for shard in measured["restore"].last_json["shards"]}
    if restored != recorded or list(recorded) != [shard.name for shard in layout.shards]:
        sys.exit(f"{out}: restore does not say of every shard that it has the source's sha256")


_LOAD = """
import json, sys, time
from pathlib import Path
from manifests.storage import load

folder = Path(sys.argv[1])
raw = (folder / "manifest.json").read_bytes()
took = {"json_seconds": [], "load_seconds": []}
for _ in range(3):
    for name, read in (("json_seconds", lambda: json.loads(raw)), ("load_seconds", lambda: load(folder))):
        begin = time.perf_counter()
        read()
        took[name].append(time.perf_counter() - begin)
print(json.dumps({name: round(min(times), 3) for name, times in took.items()}))
"""


def _measure_load(out: Path) -> dict[str, Any]:
    """Reading the manifest, and the part of it that any reader of JSON would take; the best of three."""
    measured = run([sys.executable, "-c", _LOAD, out], folder=out.parent)
    times: dict[str, Any] = measured.last_json
    beyond = round(times["load_seconds"] - times["json_seconds"], 3)
    return times | {"beyond_json_seconds": beyond, "peak_bytes": measured.peak_bytes}


def _load_line(load: dict[str, Any]) -> str:
    return (
        f"loaded in {load['load_seconds']:.2f} s, {load['beyond_json_seconds']:.2f} s of it beyond json.loads, "
        f"peak {load['peak_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
