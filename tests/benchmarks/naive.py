"""The way before: the stock library loads each shard whole and saves each expert, and each rest of a layer, as a file.

    python naive.py SOURCE_FOLDER DESTINATION_FOLDER

Written to be read, not to be fast. It hashes nothing and checks nothing; only the fsync at the end is ours.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

_PLACE = re.compile(r"model\.layers\.\d+\.(mlp\.experts\.\d+\.)?")


def place_of(name: str) -> str:
    """The file that a tensor belongs to: its expert's, its layer's, or the rest."""
    match = _PLACE.match(name)
    return match[0].rstrip(".") if match else "rest"


def reshard(source: Path, destination: Path) -> None:
    """One file for each expert, one for the rest of each layer, one for what is outside the layers."""
    shards = sorted(source.glob("*.safetensors"))
    missing: Counter[str] = Counter()
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            missing.update(place_of(name) for name in file.keys())  # noqa: SIM118  # no mapping
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for shard in shards:
        for name, tensor in load_file(shard).items():
            place = place_of(name)
            waiting.setdefault(place, {})[name] = tensor
            missing[place] -= 1
            if not missing[place]:
                save_file(waiting.pop(place), destination / f"{place}.safetensors")
    for path in destination.iterdir():
        with path.open("rb") as written:
            os.fsync(written.fileno())


def _main() -> None:
    source, destination = map(Path, sys.argv[1:])
    destination.mkdir()
    reshard(source, destination)


if __name__ == "__main__":
    _main()
