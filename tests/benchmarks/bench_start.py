"""How long the whole of DeepSeek-V3 takes to open, and what a token costs beside its products: all layers, all files.

    python tests/benchmarks/bench_start.py --dir SCRATCH [--tokens N] [--ram SIZE]

Describes the full resharded layout (15,104 experts) by a manifest of real names, shapes and offsets over files that are
holes, and opens it as every command does. With --tokens, tokens are decoded through all 61 layers: weights are zeros,
so the text means nothing and the disk gives holes; what is seen is that it runs in its memory, and what the products
and Python around them cost. That needs about 20 GB of memory.

The last line of stdout is one JSON document. What it made is removed, whatever happens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from layouts import Layout, deepseek_v3
from report import finish, say
from scratch import workspace
from sparse import write_sparse

from manifests.config import model_facts
from manifests.digest import CHUNK_BYTES
from manifests.schema import Manifest, Selection, Shard, Source
from manifests.storage import save
from reshard.described import file_entry
from reshard.documents import header_paths, write_kept
from reshard.plan import PlannedTensor, make_plan
from reshard.source import read_source

_MEASURE = """
import json, sys, time
import torch
begin = time.perf_counter()
from runner.loaded import LoadedModel
from runner.cache import LatentCache
from runner import machine
imported = time.perf_counter()
model = LoadedModel(sys.argv[1], ctx=64, ram=int(sys.argv[3]) or None, io="direct")
opened = time.perf_counter()
cache, seconds = LatentCache(model.model.config, 64), []
for token in range(int(sys.argv[2])):
    start = time.perf_counter()
    model.model.logits(model.model.hidden(torch.tensor([token]), cache))
    seconds.append(time.perf_counter() - start)
print(json.dumps({"import_s": imported - begin, "open_s": opened - imported, "token_s": seconds,
    "peak_bytes": machine.peak_bytes(), "usage": str(model.weights.usage), **model.budget.to_document()}))
"""


def main() -> int:
    """Make the layout, open it, run it."""
    parser = argparse.ArgumentParser(description="Open DeepSeek-V3's full layout, as holes.")
    parser.add_argument("--dir", type=Path, required=True, help="folder whose file system has holes")
    parser.add_argument("--tokens", type=int, default=0, help="tokens to decode (default 0)")
    parser.add_argument("--ram", type=int, default=0, help="bytes the run may take (default: what the machine has)")
    options = parser.parse_args()
    with workspace(options.dir, 2 << 30) as folder:
        describe(deepseek_v3(), folder)
        finish("start: DeepSeek-V3", measure(folder / "out", options.tokens, options.ram))
    return 0


def describe(layout: Layout, folder: Path) -> None:
    """Write the manifest of a resharded checkpoint, and its files as holes."""
    source, out = folder / "source", folder / "out"
    source.mkdir()
    out.mkdir()
    write_sparse(source, layout, random_bytes=0)
    found = read_source(source)
    plan = make_plan(found, Selection())
    for file in plan.files:
        path = out / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as made:
            made.truncate(file.size)
    documents, kept = write_kept(found, out), header_paths(found.shards)
    shards = tuple(
        Shard(name=name, size=header.file_bytes, sha256=_any_sha256(name), header=kept[name])
        for name, header in found.shards.items()
    )
    manifest = Manifest(
        layout="resharded",
        model=model_facts(found.config),
        selection=plan.selection,
        files=(),
        documents=tuple(sorted(documents, key=lambda document: document.path)),
        source=Source(kind="safetensors", shards=shards),
    )
    save(manifest, out, files=(file_entry(file, _any_chunks) for file in plan.files))
    say(f"{len(plan.files):,} files, manifest of {(out / 'manifest.json').stat().st_size:,} bytes")


def _any_chunks(tensor: PlannedTensor) -> tuple[str, ...]:
    return tuple(_any_sha256(f"{tensor.name} {at}") for at in range(0, tensor.size, CHUNK_BYTES))


def _any_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def measure(folder: Path, tokens: int, ram: int) -> dict[str, Any]:
    """Open it in a process of its own, twice; the second time says what opening costs."""
    result: dict[str, Any] = {}
    for last in (False, True):
        command = [sys.executable, "-c", _MEASURE, folder, str(tokens if last else 0), str(ram)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            sys.exit(done.stderr)
        result = json.loads(done.stdout)
        say(f"opened in {result['open_s']:.2f} s, {result['expert_slots']:,} experts fit")
    for number, seconds in enumerate(result["token_s"]):
        say(f"token {number}: {seconds:.2f} s")
    say(f"peak {result['peak_bytes'] / 1e9:.2f} GB; {result['usage']}")
    return result


if __name__ == "__main__":
    sys.exit(main())
