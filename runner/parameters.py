"""What the mathematics asks of the weights: by name, when used, in the shape that the config promises.

A stored tensor of another shape is refused here with its name; further in it would be a riddle. This file
must not know files or mappings.

Shapes: T tokens, D row width.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from torch import Tensor

from manifests.errors import IntegrityError, ManifestError
from manifests.names import expert_prefix
from manifests.schema import PLAIN
from runner import split_kv
from runner.fp8 import Matrix, Mlp, check, dequantize, stored_matrix, widen


class Expert(Protocol):
    """A routed expert that is in memory.

    Attributes:
        prepared: Kept as long as the tensors are; None at first.
    """

    prepared: Any

    @property
    def key(self) -> tuple[int, int]:
        """Layer and number."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its stored tensors by their whole names."""

    def encoding(self, name: str, /) -> str:
        """What the bytes of one of these encode; ``plain`` for numbers."""


class Weights(Protocol):
    """A store of tensors under their Hugging Face names; ``runner.weights.WeightStore`` is the real one."""

    def __contains__(self, name: str, /) -> bool: ...

    def tensor(self, name: str, /) -> Tensor:
        """Give a tensor in its stored dtype."""

    def matrix(self, prefix: str, /) -> Matrix:
        """Give ``prefix.weight`` with ``prefix.weight_scale_inv`` where the weight is FP8."""

    def shape(self, name: str, /) -> tuple[int, ...]:
        """Give the shape of what a tensor stands for, without reading it."""

    def rows(self, name: str, ids: Sequence[int], /) -> Matrix:
        """Give some rows of a matrix, as they are stored."""

    def expert_groups(self, layer: int, experts: Sequence[int], /) -> Iterator[Iterator[Sequence[Expert]]]:
        """Give routed experts in groups that follow their order, and in each group as they arrive."""

    def begin_pass(self) -> None:
        """Count one pass through the model."""


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
        return self._sized(replace(self._weights.matrix(prefix), name=f"{prefix}.weight"), rows, columns)

    def kv_b(self, prefix: str, heads: int, sizes: tuple[int, int], latent: int) -> Matrix:
        """Give ``kv_b_proj`` below ``prefix``, whole or made of its halves.

        Args:
            prefix: Such as "model.layers.3.self_attn".
            heads: H.
            sizes: Rows of each head that make keys, N, and those that make values, V.
            latent: C.

        Returns:
            [H * (N+V), C].

        Raises:
            IntegrityError: It, or a half, has another shape.
            Others: See `matrix`.
        """
        nope, value = sizes
        if (parts := split_kv.halves(f"{prefix}.kv_b_proj.weight", self._weights)) is not None:
            # Before they are joined: their sum could be right and its parts not.
            for name, shape in zip(parts, ((heads, latent, nope), (heads, value, latent)), strict=True):
                check_shape(name, self._weights.shape(name), shape)
        return self.matrix(f"{prefix}.kv_b_proj", heads * (nope + value), latent)

    def vector(self, name: str, size: int) -> Tensor:
        """Give a small plain tensor as [size] float32, where a float may lie.

        Raises:
            IntegrityError: It has another shape.
        """
        stored = self._weights.tensor(name)
        check_shape(name, tuple(stored.shape), (size,))
        wide = widen(stored, name)
        # One that is stored as float32 is still where its file put it, at any byte.
        return wide.clone() if wide.data_ptr() % wide.element_size() else wide

    def rows(self, name: str, ids_T: Tensor, rows: int, columns: int) -> Tensor:
        """Give the rows ``ids_T`` of a [rows, columns] tensor without scales as [T, columns] float32, and no others.

        Raises:
            IntegrityError: It has another shape.
        """
        check_shape(name, self._weights.shape(name), (rows, columns))
        found = self._weights.rows(name, ids_T.tolist())
        return widen(found.weight, name) if found.encoding == PLAIN else dequantize(found)

    def mlp(self, prefix: str, width: int, hidden: int) -> Mlp:
        """Give the MLP below ``prefix``, such as "model.layers.3.mlp.shared_experts".

        Raises:
            IntegrityError, ManifestError, UnsupportedModelError: One of its matrices cannot be used.
        """
        return _checked_mlp(
            self.matrix(f"{prefix}.gate_proj", width, hidden),
            self.matrix(f"{prefix}.up_proj", width, hidden),
            self.matrix(f"{prefix}.down_proj", hidden, width),
        )

    def experts(
        self, layer: int, experts: Sequence[int], width: int, hidden: int
    ) -> Generator[Iterator[list[tuple[int, Mlp]]]]:
        """Give routed experts of a layer with their numbers, in groups that follow their order.

        Each group gives its members as they arrive, at first those that were there, which may be none.

        Raises:
            See `mlp`, and whatever the store raises.
        """
        for group in self._weights.expert_groups(layer, experts):
            yield ([(expert.key[1], self._prepare(expert, width, hidden)) for expert in some] for some in group)

    def begin_pass(self) -> None:
        """Tell the store that a pass through the model begins."""
        self._weights.begin_pass()

    def _prepare(self, expert: Expert, width: int, hidden: int) -> Mlp:
        if expert.prepared is None:
            prefix = expert_prefix(*expert.key)
            expert.prepared = _checked_mlp(
                self._sized(_held_matrix(expert, f"{prefix}gate_proj"), width, hidden),
                self._sized(_held_matrix(expert, f"{prefix}up_proj"), width, hidden),
                self._sized(_held_matrix(expert, f"{prefix}down_proj"), hidden, width),
            )
        return cast(Mlp, expert.prepared)

    def _sized(self, matrix: Matrix, rows: int, columns: int) -> Matrix:
        check_shape(matrix.name, matrix.shape, (rows, columns))
        if matrix.scale is not None and self._block is None:
            raise ManifestError(
                f"{matrix.name} has block scales, but config.json has no quantization_config to size them"
            )
        return replace(matrix, block=self._block or matrix.block)


def _held_matrix(expert: Expert, prefix: str) -> Matrix:
    weight = expert.tensors.get(f"{prefix}.weight")
    if weight is None:  # it takes no place in memory
        raise IntegrityError(f"{prefix}.weight has no numbers; the tensor is damaged")
    scale = expert.tensors.get(f"{prefix}.weight_scale_inv")
    return stored_matrix(prefix, weight, scale, expert.encoding(f"{prefix}.weight"))


def _checked_mlp(gate: Matrix, up: Matrix, down: Matrix) -> Mlp:
    for matrix in (gate, up, down):
        check(matrix)
    return Mlp(gate=gate, up=up, down=down)


def check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Refuse a tensor whose shape is not the one wanted.

    Raises:
        IntegrityError: It is not.
    """
    if shape != wanted:
        raise IntegrityError(
            f"{name} has shape {list(shape)}, but config.json asks for {list(wanted)}; "
            "the config belongs to another checkpoint, or the tensor is damaged"
        )
