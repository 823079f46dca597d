"""Rows of ggml's quantised blocks: which of them can be expanded, and to what.

A quantised matrix is stored as bytes, [O, row_bytes], and a row is a whole number of blocks. `runner.kernels`
multiplies by the common types as they are stored, and expands them; what the numbers of the others are is asked of
ggml's own package, `gguf`, which is an extra, and so are those of all types where there are no kernels. This file must
not know names, files or layers.

Shapes: O rows, I numbers in a row.

Source: the types that quants.py of the package gguf 0.19 expands.
"""

import importlib.util
from types import MappingProxyType

import torch
from torch import Tensor

from manifests.errors import IntegrityError, ToolkitError, UnsupportedModelError
from manifests.ggml import BLOCK_TYPES

# Not Q8_1 and Q8_K, which no file has: ggml makes them of activations; nor Q1_0, which quants.py does not know.
_EXPANDED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
_TYPES = {block_type.name: block_type for block_type in BLOCK_TYPES.values()}

BLOCKS = MappingProxyType({name: (_TYPES[name].elements, _TYPES[name].size) for name in _EXPANDED})
"""By encoding: numbers and bytes of a block."""


def check_described(
    dtype: str, shape: tuple[int, ...], logical_shape: tuple[int, ...], encoding: str, name: str
) -> None:
    """Refuse what a checkpoint says of a tensor when that cannot be blocks which can be expanded.

    Args:
        dtype: safetensors tag.
        shape: As it is stored.
        logical_shape: Of the numbers that it stands for.
        encoding: What it is said to be.
        name: For messages.

    Raises:
        IntegrityError: Its rows are not whole blocks, or not bytes.
        UnsupportedModelError: The encoding is not one that is read.
    """
    elements, size = _block(encoding, name)
    *rows, columns = logical_shape or (0,)
    if dtype != "U8" or columns % elements or shape != (*rows, columns // elements * size):
        raise IntegrityError(
            f"{name} is said to be {list(logical_shape)} in {encoding} and stored as {dtype} {list(shape)}; blocks of "
            f"{elements} numbers are {size} bytes, so the checkpoint is damaged"
        )


def _block(encoding: str, name: str) -> tuple[int, int]:
    if encoding not in BLOCKS:
        raise UnsupportedModelError(f"{name} is encoded as {encoding}; the runner reads {', '.join(BLOCKS)}")
    return BLOCKS[encoding]


def shape(weight: Tensor, encoding: str, name: str) -> tuple[int, ...]:
    """Give the shape of what rows of blocks stand for; what is no whole block is left out.

    Args:
        weight: [..., O, row_bytes].
        encoding: Of BLOCKS.
        name: For messages.

    Returns:
        (..., O, I).

    Raises:
        UnsupportedModelError: The encoding is not one that is read.
    """
    columns, size = _block(encoding, name)
    *rows, row_bytes = weight.shape
    return *rows, row_bytes // size * columns


def check(weight: Tensor, encoding: str, name: str) -> None:
    """Refuse rows that are not whole blocks.

    Raises:
        IntegrityError: They are not, or are not bytes.
        UnsupportedModelError: As for `shape`.
    """
    shape(weight, encoding, name)
    if weight.dtype is not torch.uint8:
        raise IntegrityError(f"{name} is encoded as {encoding} but stored as {weight.dtype}; blocks are bytes")
    size = BLOCKS[encoding][1]
    if weight.shape[1] % size:
        raise IntegrityError(
            f"{name} has rows of {weight.shape[1]} bytes, which are no whole {encoding} blocks of {size} bytes; "
            "the tensor is damaged"
        )


def need_package(name: str, encoding: str) -> None:
    """Refuse blocks where the package that expands them is not installed; it is not imported for this.

    Raises:
        ToolkitError: It is not.
    """
    if importlib.util.find_spec("gguf") is None:
        raise _missing_package(name, encoding)


def _missing_package(name: str, encoding: str) -> ToolkitError:
    return ToolkitError(
        f"{name} is encoded as {encoding}, and expanding it needs the package gguf; "
        "install it with: pip install 'expert-reshard[gguf]'"
    )


def expand(weight: Tensor, encoding: str, name: str) -> Tensor:
    """Expand rows of blocks, which were checked, to [O, I] float32, exactly as ggml defines them.

    Raises:
        ToolkitError: The package gguf is not installed.
    """
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise _missing_package(name, encoding) from error
    if not weight.numel():
        return torch.empty(shape(weight, encoding, name))
    return torch.from_numpy(quants.dequantize(weight.contiguous().numpy(), GGMLQuantizationType[encoding]))
