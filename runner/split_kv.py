"""``kv_b_proj`` out of its two halves, which newer GGUF files have in its place.

Each head of kv_b_proj has rows that make its keys, then rows that make its values. The files have the first as
``k_b_proj``, [H, C, N], turned for each head, and the second as ``v_b_proj``, [H, V, C]. Attention reads kv_b_proj, so
it is made of them, once for each layer, as float32: both have blocks along their last axis, which are not the rows of
what is made, and float32 holds what they stand for exactly. The price is memory, which the budget counts: 8.4 MB for
each of V2-Lite's 27 layers, 67 MB for each of V3's 61; the halves are then let go. This file must not know files or
attention, and imports torch only to join: who asks for names may have none.

Shapes: H heads, C latent (kv_lora_rank), N key part without position, V value.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from runner.fp8 import Matrix

_WHOLE, _KEYS, _VALUES = ".kv_b_proj.weight", ".k_b_proj.weight", ".v_b_proj.weight"
_FLOAT_BYTES = 4


class Names(Protocol):
    """Whatever knows which tensors there are."""

    def __contains__(self, name: str, /) -> bool: ...


def halves(name: str, names: Names) -> tuple[str, str] | None:
    """Names of the halves that stand for a tensor; None when it is there, is not kv_b_proj, or they are not there.

    Args:
        name: Of the tensor.
        names: What there is.
    """
    if not name.endswith(_WHOLE) or name in names:
        return None
    prefix = name.removesuffix(_WHOLE)
    found = f"{prefix}{_KEYS}", f"{prefix}{_VALUES}"
    return found if all(half in names for half in found) else None


def whole_of(name: str) -> str | None:
    """Name of the kv_b_proj that this is a half of; None for other tensors."""
    half = next((half for half in (_KEYS, _VALUES) if name.endswith(half)), None)
    return None if half is None else f"{name.removesuffix(half)}{_WHOLE}"


def joined_bytes(k_b: tuple[int, ...], v_b: tuple[int, ...]) -> int:
    """Bytes of what `join` makes of halves of these shapes."""
    return (prod(k_b) + prod(v_b)) * _FLOAT_BYTES


def join(k_b: Matrix, v_b: Matrix) -> Tensor:
    """Give [H * (N+V), C] float32, exactly what the halves stand for.

    One half is expanded at a time, before attention makes anything of its own: in V3 34 MB beside what is made.

    Args:
        k_b: [H, C, N], as it is stored.
        v_b: [H, V, C], likewise.

    Raises:
        IntegrityError, UnsupportedModelError, ToolkitError: See `dequantize`.
    """
    import torch

    (heads, latent, nope), value = k_b.shape, v_b.shape[1]
    made = torch.empty(heads, nope + value, latent)
    made[:, :nope] = _expand(k_b).mT
    made[:, nope:] = _expand(v_b)
    return made.view(-1, latent)


def _expand(stack: Matrix) -> Tensor:
    """All heads of a stack, [H, O, I] float32."""
    from runner.fp8 import dequantize

    return dequantize(replace(stack, weight=stack.weight.flatten(0, 1))).view(stack.shape)
