"""FP8 e4m3fn from its bit definition, block by block. Slow and plain; imports nothing of the project."""

import torch
from torch import Tensor


def decode_e4m3fn(code: int) -> float:
    """Value of one byte: sign, 4 exponent bits with bias 7, 3 mantissa bits; 0x7F and 0xFF are NaN, nothing is inf."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0x0F, code & 0x07
    if exponent == 0x0F and mantissa == 0x07:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


TABLE = torch.tensor([decode_e4m3fn(code) for code in range(256)], dtype=torch.float32)


def dequantize(weight: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    """[O, I] float32: each byte looked up, times the scale at [row // block, column // block]."""
    value = TABLE[weight.view(torch.uint8).long()]
    row = torch.arange(weight.shape[0]) // block
    column = torch.arange(weight.shape[1]) // block
    return value * scale[row][:, column]


def quantize(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """[O, I] float8_e4m3fn and [ceil(O/block), ceil(I/block)] float32, such that each block's largest is 448."""
    rows, columns = weight.shape
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // block), -(-columns // block))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight[here].abs().max() / 448
            stored[here] = (weight[here] / scale[i, j]).to(torch.float8_e4m3fn)
    return stored, scale
