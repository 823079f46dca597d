"""A checkpoint of true width with fewer layers, random weights that compute, and the published shard rule.

    python tests/benchmarks/make_slice.py OUT [--model v3|v2-lite] [--dense-layers N] [--moe-layers N]
                                              [--experts N] [--vocab N] [--seed S] [--mtp]

DeepSeek-V3 in FP8 with block scales: one dense and one MoE layer of 256 experts are 15.8 GB. DeepSeek-V2-Lite in
BF16: all 27 layers are 31.4 GB. Every weight is gaussian with the deviation that the models were initialised with, so
that activations keep their size from layer to layer; the MTP layer's embedding and head are copies, as published.

The same options give the same bytes. Progress goes to stderr; the last line of stdout is one JSON document. OUT
appears when it is whole, and not at all when something goes wrong.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from dense import write_all
from layouts import V2_LITE_CONFIG, V3_CONFIG, Layout, ShardLayout, one_stage
from raw_copy import PAGE_BYTES, ring
from report import finish, say
from scratch import workspace
from tqdm import tqdm

from manifests.errors import ToolkitError
from manifests.header import HeaderTensor
from manifests.paths import INDEX_NAME
from manifests.storage import sync_folder
from runner.config import ModelConfig

MODELS = {"v3": V3_CONFIG, "v2-lite": V2_LITE_CONFIG}
DEVIATION = 0.02
"""Both models' initializer_range."""

BLOCK_SIGMAS = 4.0
"""The largest of the 16,384 weights of a block is near so many deviations; it has the code of 448."""

SPARE_BYTES = 1 << 30
_BLOCK_BYTES = 16 << 20
# Primes: rows of no matrix, whatever its width, begin twice at the same place of a pool, nor do tensors.
_LARGE_POOL, _SMALL_POOL = 33_554_393, 65_537
_STRIDE = 0.6180339887
"""Tensors of neighbouring numbers begin this share of a pool apart."""


def main() -> int:
    """Write one slice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--model", choices=tuple(MODELS), default="v3")
    parser.add_argument("--dense-layers", type=int, default=1)
    parser.add_argument("--moe-layers", type=int, help="default 1, and 26 for v2-lite, which are all")
    parser.add_argument("--experts", type=int, help="of a MoE layer; default 256 and 64")
    parser.add_argument("--vocab", type=int, help="rows of embedding and head; default the model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mtp", action="store_true", help="add V3's layer that predicts a token further")
    options = parser.parse_args()
    try:
        config = slice_config(
            MODELS[options.model],
            dense_layers=options.dense_layers,
            moe_layers=options.moe_layers,
            experts=options.experts,
            vocab=options.vocab,
            mtp=options.mtp,
        )
    except ToolkitError as error:
        parser.error(str(error))
    if options.out.exists():
        sys.exit(f"{options.out}: is there already; remove it or name another folder")
    try:
        finish(f"slice: {options.model}", make_slice(options.out, one_stage(config), seed=options.seed))
    except KeyboardInterrupt:
        say("interrupted; what was made is removed")
        return 130
    return 0


def slice_config(
    model: Mapping[str, Any],
    *,
    dense_layers: int = 1,
    moe_layers: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    mtp: bool = False,
) -> dict[str, Any]:
    """The model's config.json with fewer layers, experts and tokens; all widths stay.

    Raises:
        ToolkitError: The runner could not run it.
    """
    if moe_layers is None:
        moe_layers = 26 if model is V2_LITE_CONFIG else 1
    if dense_layers < 0 or moe_layers < 1:
        raise ToolkitError("a slice has at least one MoE layer, and no negative number of dense ones")
    if mtp and model["model_type"] != "deepseek_v3":
        raise ToolkitError("only V3 has an MTP layer")
    config = {**model, "first_k_dense_replace": dense_layers, "num_hidden_layers": dense_layers + moe_layers}
    if "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = int(mtp)
    if experts is not None:
        config["n_routed_experts"] = experts
    if vocab is not None:
        config["vocab_size"] = vocab
        # Beginning and end of a text are tokens too.
        for key in ("bos_token_id", "eos_token_id"):
            config[key] = min(config[key], vocab - 1)
    ModelConfig.from_dict(config)
    return config


def make_slice(out: Path, layout: Layout, *, seed: int = 0) -> dict[str, Any]:
    """Write a checkpoint into a new folder: beside it first, and renamed when all of it is on the disk.

    Raises:
        SystemExit: The disk has too little room.
    """
    say(f"{layout.size / 1e9:.2f} GB in {len(layout.shards)} shards, {layout.tensor_count:,} tensors, to {out}")
    with workspace(out.parent, layout.size + SPARE_BYTES) as folder:
        begin = time.perf_counter()
        whole = folder / out.name
        whole.mkdir()
        (whole / "config.json").write_text(json.dumps(layout.config, indent=2), encoding="utf-8")
        (whole / INDEX_NAME).write_bytes(layout.index)
        values = Values(layout, seed)
        with tqdm(total=layout.size, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
            for shard in layout.shards:
                _write_shard(whole / shard.name, shard, values, bar)
        sync_folder(whole)
        whole.rename(out)
        sync_folder(out.parent)
    seconds = time.perf_counter() - begin
    return {
        "bytes": layout.size,
        "shards": len(layout.shards),
        "tensors": layout.tensor_count,
        "seconds": round(seconds, 2),
        "gb_per_s": round(layout.size / seconds / 1e9, 3),
    }


class Values:
    """What is in every tensor: ranges of a few pools of random numbers, each range beginning at a place of its own.

    Args:
        layout: Its tensors are numbered in their order.
        seed: Of all pools.
    """

    def __init__(self, layout: Layout, seed: int) -> None:
        normal = _normal_table()
        large = min(_LARGE_POOL, _next_prime(max(_SMALL_POOL, layout.size // 8)))
        self._pools = {
            name: _Pool(table, size, f"{seed} {name}")
            for name, table, size in (
                ("code", _e4m3(normal * (448 / BLOCK_SIGMAS)), large),
                ("weight", _bfloat16(normal * DEVIATION), large),
                # Blocks of a trained matrix differ; none is empty.
                ("scale", (DEVIATION * BLOCK_SIGMAS / 448 * (1 + normal / 8)).astype("<f4"), _SMALL_POOL),
                ("norm", _bfloat16(1 + normal / 8), _SMALL_POOL),
                # Enough that some experts are chosen more often, not so much that the token does not matter.
                ("bias", (normal / 100).astype("<f4"), _SMALL_POOL),
            )
        }
        names = [tensor.name for shard in layout.shards for tensor in shard.tensors]
        self._numbers = {name: number for number, name in enumerate(names)}
        mtp = f"model.layers.{layout.config['num_hidden_layers']}"
        for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            if f"{mtp}.{copy}.weight" in self._numbers:
                self._numbers[f"{mtp}.{copy}.weight"] = self._numbers[f"{original}.weight"]

    def of(self, tensor: HeaderTensor) -> Iterator[memoryview]:
        """The tensor's bytes in order."""
        return self._pools[_kind(tensor)].cut(self._numbers[tensor.name], tensor.end - tensor.begin)


class _Pool:
    """Numbers drawn at random from a table of 65,536."""

    def __init__(self, table: np.ndarray[Any, Any], size: int, seed: str) -> None:
        self._size, self._item = size, table.itemsize
        chance = random.Random(seed)
        pool = np.empty(size, table.dtype)
        for begin in range(0, size, 1 << 20):
            count = min(1 << 20, size - begin)
            pool[begin : begin + count] = table[np.frombuffer(chance.randbytes(2 * count), "<u2")]
        self._data = memoryview(pool).cast("B")

    def cut(self, number: int, size: int) -> Iterator[memoryview]:
        """So many bytes from the place of this number on, from the start again behind the end."""
        begin = number * int(_STRIDE * self._size) % self._size * self._item
        while size:
            piece = self._data[begin : begin + size]
            yield piece
            begin, size = 0, size - len(piece)


def _kind(tensor: HeaderTensor) -> str:
    if tensor.dtype == "F8_E4M3":
        return "code"
    if tensor.dtype == "F32":
        return "scale" if tensor.name.endswith("_scale_inv") else "bias"
    return "norm" if "norm" in tensor.name else "weight"


def _normal_table() -> np.ndarray[Any, Any]:
    """The standard normal distribution in 65,536 equally likely numbers; no library's generator, so for all time."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((index + 0.5) / 65536) for index in range(65536)])


def _e4m3(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The nearest FP8 codes; what is larger than 448 becomes 448."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    known = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    nearest = np.searchsorted((known[1:] + known[:-1]) / 2, np.abs(values))
    return (nearest | np.where(values < 0, 0x80, 0)).astype("u1")


def _bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The nearest bfloat16 numbers, as their bits."""
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def _next_prime(number: int) -> int:
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number


def _write_shard(path: Path, shard: ShardLayout, values: Values, bar: tqdm[Any]) -> None:
    """One file, past the page cache where that is possible, fsynced."""
    (block,) = ring(1, _BLOCK_BYTES)
    filled = offset = 0
    descriptor = _create(path)
    try:
        for piece in _pieces(shard, values):
            taken = 0
            while taken < len(piece):
                count = min(len(piece) - taken, _BLOCK_BYTES - filled)
                block[filled : filled + count] = piece[taken : taken + count]
                taken, filled = taken + count, filled + count
                if filled == _BLOCK_BYTES:
                    write_all(descriptor, block, offset)
                    offset, filled = offset + filled, 0
                    bar.update(_BLOCK_BYTES)
        write_all(descriptor, block[: -(-filled // PAGE_BYTES) * PAGE_BYTES], offset)
        os.ftruncate(descriptor, shard.size)
        os.fsync(descriptor)
        bar.update(filled)
    finally:
        os.close(descriptor)


def _pieces(shard: ShardLayout, values: Values) -> Iterator[memoryview]:
    yield memoryview(shard.header)
    for tensor in shard.tensors:
        yield from values.of(tensor)


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # some file systems make it before they refuse
        return os.open(path, flags, 0o644)


if __name__ == "__main__":
    sys.exit(main())
