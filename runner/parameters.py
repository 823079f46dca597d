"""What the mathematics asks of the weights: by name, when used, in the shape that the config promises.

A stored tensor of another shape is refused here with its name; further in it would be a riddle. This file
must not know files or mappings.

Shapes: T tokens, D row width.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from manifests.errors import IntegrityError, ManifestError
from runner.fp8 import Matrix, widen


class Weights(Protocol):
    """A store of tensors under their Hugging Face names; ``runner.weights.WeightStore`` is the real one."""

    def tensor(self, name: str, /) -> Tensor:
        """Give a tensor in its stored dtype."""

    def matrix(self, prefix: str, /) -> Matrix:
        """Give ``prefix.weight`` with ``prefix.weight_scale_inv`` where the weight is FP8."""


class Parameters:
    """Typed, shape-checked reads from a store.

    Args:
        weights: Where the tensors are.
        block: Rows and columns per FP8 scale, from config.json; None when it announces no FP8.
    """

    def __init__(self, weights: Weights, block: tuple[int, int] | None) -> None:
        self._weights = weights
        self._block = block

    def matrix(self, prefix: str, rows: int, columns: int) -> Matrix:
        """Give the matrix ``prefix.weight``, [rows, columns], with the block size of config.json.

        Raises:
            IntegrityError: It has another shape.
            ManifestError: It is FP8, and config.json gives no block size.
        """
        matrix = self._weights.matrix(prefix)
        _check_shape(f"{prefix}.weight", matrix.weight, (rows, columns))
        if matrix.scale is not None and self._block is None:
            raise ManifestError(
                f"{prefix}.weight has block scales, but config.json has no quantization_config to size them"
            )
        return replace(matrix, block=self._block or matrix.block, name=f"{prefix}.weight")

    def vector(self, name: str, size: int) -> Tensor:
        """Give a small plain tensor as [size] float32.

        Raises:
            IntegrityError: It has another shape.
        """
        stored = self._weights.tensor(name)
        _check_shape(name, stored, (size,))
        return widen(stored, name)

    def rows(self, name: str, ids_T: Tensor, rows: int, columns: int) -> Tensor:
        """Give the rows ``ids_T`` of a plain [rows, columns] tensor as [T, columns] float32, and no others.

        Raises:
            IntegrityError: It has another shape.
        """
        stored = self._weights.tensor(name)
        _check_shape(name, stored, (rows, columns))
        return widen(torch.index_select(stored, 0, ids_T), name)


def _check_shape(name: str, stored: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(stored.shape) != wanted:
        raise IntegrityError(
            f"{name} has shape {list(stored.shape)}, but config.json asks for {list(wanted)}; "
            "the config belongs to another checkpoint, or the tensor is damaged"
        )
