"""Write tensors as shards in the form in which DeepSeek-V3 is published, without torch.

The writer appends tensors in the given order and closes a shard as soon as its element count, FP8 scales counted as
elements too, reaches a limit; every pipeline stage starts a new shard. So a boundary falls wherever it falls: between
a weight and its scale, inside an expert. Headers are compact and not padded, so data start at any byte.

It knows names, shapes and bytes; it must not know what a tensor means. The demo model and the tests' tiny models are
both written with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

from manifests.dtypes import nbytes
from manifests.header import HeaderTensor, encode_header

Stage = Sequence["StoredTensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor ready to be written.

    Attributes:
        name: Published name.
        dtype: safetensors tag, such as "F8_E4M3".
        shape: Sizes; () is a scalar.
        data: Row-major little-endian bytes, exactly as long as dtype and shape ask.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) != nbytes(self.dtype, self.shape):
            raise ValueError(f"{self.name}: {len(self.data)} bytes do not fill {self.dtype} {list(self.shape)}")


def split(stages: Sequence[Stage], limit: int) -> list[list[StoredTensor]]:
    """Distribute the tensors of all stages over shards that are closed at `limit` elements."""
    shards: list[list[StoredTensor]] = []
    for stage in stages:
        shard: list[StoredTensor] = []
        elements = 0
        for tensor in stage:
            shard.append(tensor)
            elements += prod(tensor.shape)
            if elements >= limit:
                shards.append(shard)
                shard, elements = [], 0
        if shard:
            shards.append(shard)
    return shards


def element_limit(stages: Sequence[Stage], shards: int) -> int:
    """The smallest limit with which `split` gives exactly so many shards.

    Raises:
        ValueError: No limit gives that number. Where most tensors have the same size, many shards break up at once.
    """
    low, high = 1, sum(prod(tensor.shape) for tensor in chain.from_iterable(stages))
    while low < high:  # a larger limit never gives more shards
        middle = (low + high) // 2
        if len(split(stages, middle)) > shards:
            low = middle + 1
        else:
            high = middle
    if len(split(stages, low)) != shards:
        raise ValueError(f"no element limit gives {shards} shards; the nearest below is {len(split(stages, low))}")
    return low


def write(folder: Path, shards: Sequence[Sequence[StoredTensor]]) -> None:
    """Write the shards and their index into an existing folder.

    The index's `total_size` is two bytes for every element, scales included, whatever the stored type: so it is in
    the original, where it was computed before the weights became FP8.
    """
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        write_file(folder / file_name, shard)
        weight_map |= {tensor.name: file_name for tensor in shard}
    elements = sum(prod(tensor.shape) for tensor in chain.from_iterable(shards))
    index = {"metadata": {"total_size": 2 * elements}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_file(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """Write one safetensors file: compact header, no padding, data in the given order."""
    entries, position = [], 0
    for tensor in tensors:
        end = position + len(tensor.data)
        entries.append(HeaderTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, begin=position, end=end))
        position = end
    with path.open("wb") as file:
        file.write(encode_header(entries))
        file.writelines(tensor.data for tensor in tensors)
