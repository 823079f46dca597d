"""Weights as they are stored, and products with them: FP8 blocks, bfloat16, float16, float32, ggml's quantised blocks.

Products are those of `runner.kernels`, or torch's where these could not be built: then a few block rows of one matrix
are expanded at a time, so stored weights never turn into a float32 copy of the model, nor even of one large matrix.
This file must not know names, files or layers.

Shapes: T tokens, I inputs, O outputs, (bo, bi) rows and columns of one block.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from manifests.errors import IntegrityError, ManifestError, UnsupportedModelError
from manifests.schema import PLAIN
from runner import kernels, quantised

_PLAIN = (torch.bfloat16, torch.float16, torch.float32)

_EXPANDED_ELEMENTS = 1 << 22
"""Elements of a matrix that a product expands at once: 16 MiB of float32, which a last-level cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight matrix as it is stored.

    Attributes:
        weight: [O, I] float8_e4m3fn, bfloat16, float16 or float32; with an encoding [O, row_bytes] uint8.
        scale: [ceil(O/bo), ceil(I/bi)] float32, the tensor stored as ``weight_scale_inv``; with FP8 only.
        block: (bo, bi). It comes from config.json: 192 rows with 2 rows of scales do not tell 96 from 128.
        name: For messages.
        encoding: ``plain``, or the block type of `quantised.BLOCKS` that the bytes are.
        described: Kept by `runner.kernels` for its next product.
    """

    weight: Tensor
    scale: Tensor | None
    block: tuple[int, int] = (128, 128)
    name: str = "a weight"
    encoding: str = PLAIN
    described: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns, [O, I], however they are stored.

        Raises:
            UnsupportedModelError: The encoding is not one that is read.
        """
        if self.encoding == PLAIN:
            return tuple(self.weight.shape)
        return quantised.shape(self.weight, self.encoding, self.name)


def stored_matrix(prefix: str, weight: Tensor, scale: Tensor | None, encoding: str = PLAIN) -> Matrix:
    """A matrix as a checkpoint has it, with the block size yet to be given.

    Raises:
        ManifestError: It is FP8 and has no scales.
    """
    if weight.dtype is torch.float8_e4m3fn and scale is None:
        raise ManifestError(f"{prefix}.weight is FP8 but has no weight_scale_inv; download the checkpoint again")
    return Matrix(weight=weight, scale=scale, name=f"{prefix}.weight", encoding=encoding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """The three matrices of a SwiGLU MLP.

    Attributes:
        gate, up: [F, D].
        down: [D, F].
    """

    gate: Matrix
    up: Matrix
    down: Matrix


def widen(weight: Tensor, name: str) -> Tensor:
    """Give a plain stored tensor as float32, of any shape; float32 comes back as it is, without a copy.

    Args:
        weight: The tensor.
        name: For messages.

    Raises:
        UnsupportedModelError: The dtype is none that is stored without scales.
    """
    _check_plain(weight, name)
    return weight.to(torch.float32)


def _check_plain(weight: Tensor, name: str) -> None:
    if weight.dtype not in _PLAIN:
        raise UnsupportedModelError(
            f"{name} is stored as {weight.dtype} without block scales; "
            "the runner reads bfloat16, float16, float32, and FP8 (e4m3) with scales"
        )


def dequantize(matrix: Matrix) -> Tensor:
    """Expand a matrix to [O, I] float32, exactly.

    The scale is *multiplied*, whatever its stored name says; row r and column c belong to block
    (r // bo, c // bi), so the last block of each kind may be partial. FP8 NaN codes stay NaN.

    Raises:
        IntegrityError: The scale grid does not cover the weight, or has blocks to spare; or rows are no whole blocks.
        UnsupportedModelError: The dtype or the encoding is not one that is read.
        ToolkitError: It has an encoding that no kernel expands, and the package gguf is not installed.

    Source: DeepSeek-V3 README_WEIGHTS, "Dequantization Method".
    """
    check(matrix)
    return _expand(matrix, 0, matrix.weight.shape[0])


def linear(x: Tensor, matrix: Matrix, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiply activations by a stored matrix.

    Args:
        x: [T, I] float32.
        matrix: [O, I].
        dtype: bfloat16 rounds ``x`` to bfloat16 first; the product itself is float32 with exact weights. The order of
            its sums, and so their rounding, may then depend on T.

    Returns:
        [T, O] float32.

    Raises:
        IntegrityError: As for ``dequantize``.
        UnsupportedModelError: As for ``dequantize``.
        ToolkitError: As for ``dequantize``, where no kernel multiplies by the encoding.
    """
    check(matrix)
    x_TI = round_activation(x, dtype)
    compiled = kernels.active()
    if compiled is not None and kernels.multiplies(matrix):
        return compiled.linear(x_TI, matrix, dtype=dtype)
    rows, columns = matrix.shape
    block_rows = matrix.block[0]
    # Whole blocks, as many as the limit takes; one row of blocks where that is already more.
    step = block_rows * max(1, _EXPANDED_ELEMENTS // (block_rows * columns))
    out_TO = x.new_empty(x.shape[0], rows)
    for begin in range(0, rows, step):
        expanded = _expand(matrix, begin, begin + step)
        if compiled is None:
            out_TO[:, begin : begin + step] = x_TI @ expanded.T
        else:  # whose sums do not depend on T, unlike torch's
            out_TO[:, begin : begin + step] = compiled.linear(x_TI, Matrix(weight=expanded, scale=None))
    return out_TO


def round_activation(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 activations to ``dtype`` and back; the identity for float32."""
    return x if dtype is torch.float32 else x.to(dtype).to(torch.float32)


def check(matrix: Matrix) -> None:
    """Refuse a matrix that cannot be multiplied by.

    Raises:
        IntegrityError: The scale grid does not cover the weight, or has blocks to spare; or rows are no whole blocks.
        UnsupportedModelError: The dtype or the encoding is not one that is read.
    """
    if matrix.encoding != PLAIN:
        quantised.check(matrix.weight, matrix.encoding, matrix.name)
        return
    if matrix.scale is None:
        _check_plain(matrix.weight, matrix.name)
        return
    _check_plain(matrix.scale, f"{matrix.name}_scale_inv")
    if matrix.weight.dtype != torch.float8_e4m3fn:
        raise UnsupportedModelError(f"{matrix.name} has block scales but is stored as {matrix.weight.dtype}")
    rows, columns = matrix.weight.shape
    block_rows, block_columns = matrix.block
    grid = [-(-rows // block_rows), -(-columns // block_columns)]
    if list(matrix.scale.shape) != grid:
        raise IntegrityError(
            f"{matrix.name} has shape [{rows}, {columns}] and a scale grid of {list(matrix.scale.shape)}; "
            f"blocks of {block_rows} x {block_columns} need {grid}"
        )


def _expand(matrix: Matrix, begin: int, end: int) -> Tensor:
    """Give rows [begin, end), or up to the last one, as float32; begin is a multiple of bo."""
    if matrix.encoding != PLAIN:
        part = replace(matrix, weight=matrix.weight[begin:end])
        compiled = kernels.active()
        if compiled is not None and kernels.multiplies(part):
            return compiled.expand(part)
        return quantised.expand(part.weight, part.encoding, part.name)
    if matrix.scale is None:
        return widen(matrix.weight[begin:end], matrix.name)
    block_rows, block_columns = matrix.block
    expanded = matrix.weight[begin:end].to(torch.float32)
    # One row of multipliers per block row, in place: nothing as large as the matrix is made beside it.
    for offset in range(0, expanded.shape[0], block_rows):
        row_scale = widen(matrix.scale[(begin + offset) // block_rows], f"{matrix.name}_scale_inv")
        row_scale = row_scale.repeat_interleave(block_columns)[: expanded.shape[1]]
        expanded[offset : offset + block_rows].mul_(row_scale)
    return expanded
