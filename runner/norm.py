"""Root-mean-square normalisation, compiled or by torch. Tensors only.

Shapes: D normalised width.
"""

import torch
from torch import Tensor

from runner import kernels


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last axis, then multiply by the weight.

    Args:
        x: [..., D] float32.
        weight_D: [D] float32.
        eps: Added to the mean square.

    Returns:
        [..., D] float32.
    """
    if (compiled := kernels.active()) is not None:
        return compiled.norm(x.reshape(-1, x.shape[-1]), weight_D, eps).view(x.shape)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D
