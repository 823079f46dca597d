"""Rows of ggml's quantised blocks: how large the blocks are, and what they expand to.

A quantised matrix is stored as bytes, [O, row_bytes], and a row is a whole number of blocks. What the numbers in them
are is asked of ggml's own package, `gguf`, which is an extra. `runner.kernels` multiplies by the common types as they
are stored; this is their oracle, and the only way of the others. This file must not know names, files or layers.

Shapes: O rows, I numbers in a row.

Source: GGML_QUANT_SIZES of the package gguf 0.19, and the types that its quants.py expands.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from manifests.errors import IntegrityError, ToolkitError, UnsupportedModelError

BLOCKS = MappingProxyType(
    {
        "Q4_0": (32, 18),
        "Q4_1": (32, 20),
        "Q5_0": (32, 22),
        "Q5_1": (32, 24),
        "Q8_0": (32, 34),
        "Q2_K": (256, 84),
        "Q3_K": (256, 110),
        "Q4_K": (256, 144),
        "Q5_K": (256, 176),
        "Q6_K": (256, 210),
        "IQ1_S": (256, 50),
        "IQ1_M": (256, 56),
        "IQ2_XXS": (256, 66),
        "IQ2_XS": (256, 74),
        "IQ2_S": (256, 82),
        "IQ3_XXS": (256, 98),
        "IQ3_S": (256, 110),
        "IQ4_NL": (32, 18),
        "IQ4_XS": (256, 136),
        "TQ1_0": (256, 54),
        "TQ2_0": (256, 66),
        "MXFP4": (32, 17),
        "NVFP4": (64, 36),
    }
)
"""By encoding: numbers and bytes of a block."""


def shape(weight: Tensor, encoding: str, name: str) -> tuple[int, int]:
    """Give the rows and columns that a matrix of blocks stands for; what is no whole block is left out.

    Args:
        weight: [O, row_bytes].
        encoding: Of BLOCKS.
        name: For messages.

    Raises:
        UnsupportedModelError: The encoding is not one that is read.
    """
    if encoding not in BLOCKS:
        raise UnsupportedModelError(f"{name} is encoded as {encoding}; the runner reads {', '.join(BLOCKS)}")
    columns, size = BLOCKS[encoding]
    rows, row_bytes = weight.shape
    return rows, row_bytes // size * columns


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


def expand(weight: Tensor, encoding: str, name: str) -> Tensor:
    """Expand rows of blocks, which were checked, to [O, I] float32, exactly as ggml defines them.

    Raises:
        ToolkitError: The package gguf is not installed.
    """
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise ToolkitError(
            f"{name} is encoded as {encoding}, and expanding it needs the package gguf; "
            "install it with: pip install 'expert-reshard[gguf]'"
        ) from error
    if not weight.numel():
        return torch.empty(shape(weight, encoding, name))
    return torch.from_numpy(quants.dequantize(weight.contiguous().numpy(), GGMLQuantizationType[encoding]))
