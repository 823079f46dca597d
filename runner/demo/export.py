"""Turn the network's weights into a checkpoint folder in DeepSeek-V3's published form, and read such a folder back.

It knows the stored types and the FP8 blocks; names and order come from `layout`, shards from `shards`, the small
files beside them from `documents`. It must not know the training.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from runner.demo import documents, layout, shards
from runner.demo.network import Network
from runner.fp8 import Matrix, dequantize

BLOCK = 128
E4M3_MAX = 448.0

# As many shards as the original has. All routed experts are equally large, so many shards break up at once and no
# single element limit gives 163: the first five stages and the last three have limits of their own.
FIRST_STAGES = 5
SHARDS_FIRST, SHARDS_REST = 90, 73

_TAGS = {torch.float8_e4m3fn: layout.FP8, torch.bfloat16: layout.BF16, torch.float32: layout.F32}


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to FP8 with one scale for each 128 x 128 block; blocks at the edges are smaller.

    Args:
        weight: [O, I] float32.

    Returns:
        [O, I] float8_e4m3fn and the multipliers [ceil(O / 128), ceil(I / 128)] float32. A block of zeros has scale 1.
    """
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    # [row blocks, BLOCK, column blocks, BLOCK]
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / E4M3_MAX
    scale[scale == 0] = 1
    codes = (blocks / scale).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn), scale[:, 0, :, 0]


def write_checkpoint(folder: Path, network: Network, tokenizer: Tokenizer) -> None:
    """Write a complete checkpoint into an empty or new folder."""
    state, config = network.state_dict(), network.config
    folder.mkdir(parents=True, exist_ok=True)
    stages = [[tensor for entry in stage for tensor in _stored(entry, state)] for stage in layout.stages(config)]
    parts: list[list[shards.StoredTensor]] = []
    for some, count in ((stages[:FIRST_STAGES], SHARDS_FIRST), (stages[FIRST_STAGES:], SHARDS_REST)):
        parts += shards.split(some, shards.element_limit(some, count))
    shards.write(folder, parts)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    for name, text in documents.documents(config).items():
        (folder / name).write_text(text, encoding="utf-8")


def write_weights(path: Path, network: Network) -> None:
    """Write the float32 weights under the network's own names as one file, all or nothing."""
    temporary = path.with_suffix(".tmp")
    shards.write_file(temporary, [_bytes_of(name, tensor) for name, tensor in network.state_dict().items()])
    temporary.replace(path)


@torch.no_grad()
def load_checkpoint(folder: Path, network: Network) -> None:
    """Put the dequantised weights of a folder that `write_checkpoint` wrote into the network."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]

    def load(name: str) -> Tensor:
        with safe_open(folder / index[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    state = network.state_dict()
    for entry in chain.from_iterable(layout.stages(network.config)):
        scale = load(_scale_name(entry)) if entry.dtype == layout.FP8 else None
        value = load(entry.name)
        if scale is not None:
            value = dequantize(Matrix(weight=value, scale=scale, block=(BLOCK, BLOCK), name=entry.name))
        entry.part(state[entry.key]).copy_(value)


def _stored(entry: layout.Entry, state: Mapping[str, Tensor]) -> Iterator[shards.StoredTensor]:
    """The tensor of an entry as it is stored and, right behind it, its scale if it has one."""
    value = entry.part(state[entry.key])
    if entry.dtype == layout.FP8:
        codes, scale = quantize(value)
        yield _bytes_of(entry.name, codes)
        yield _bytes_of(_scale_name(entry), scale)
    else:
        yield _bytes_of(entry.name, value.to(torch.bfloat16) if entry.dtype == layout.BF16 else value)


def _bytes_of(name: str, tensor: Tensor) -> shards.StoredTensor:
    tensor = tensor.contiguous()
    data = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    return shards.StoredTensor(name=name, dtype=_TAGS[tensor.dtype], shape=tuple(tensor.shape), data=data)


def _scale_name(entry: layout.Entry) -> str:
    return f"{entry.name}_scale_inv"
