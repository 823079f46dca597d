"""Rotary position embedding with YaRN: frequencies, tables, the rotation, the softmax scale. No weights.

Checkpoints store the rotary parts interleaved: numbers 2i and 2i+1 are one pair. transformers moves them
apart into halves before it turns them; dot products are the same, but its rotated vectors and caches are
permuted against ours and must not be compared with them.

YaRN follows the config and not the length of the text: it bends the frequencies of short prompts too.

Shapes: T positions, R rotary numbers per head (qk_rope_head_dim), P = R/2 pairs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.config import ModelConfig, YarnScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """cos and sin of the angles of T consecutive positions, with YaRN's factor on both; [T, P] float32."""

    cos: Tensor
    sin: Tensor

    def __getitem__(self, some: slice) -> "Rotation":
        """Of some of the positions."""
        return Rotation(cos=self.cos[some], sin=self.sin[some])


class Rope:
    """Rotations of a model by position."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequency_P = frequencies(config)
        self._magnitude = 1.0
        if config.rope_scaling is not None:
            yarn = config.rope_scaling
            self._magnitude = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)

    def rotation(self, start: int, count: int) -> Rotation:
        """Give the rotation of positions start .. start + count - 1.

        Angles are float32, as in every reference: at position 100,000 they are off by about 0.01 rad, and the
        models were trained with exactly these.
        """
        position_T = torch.arange(start, start + count, dtype=torch.float32)
        angle_TP = torch.outer(position_T, self._frequency_P)
        return Rotation(cos=angle_TP.cos() * self._magnitude, sin=angle_TP.sin() * self._magnitude)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn interleaved pairs.

    Args:
        x: [T, R] or [T, heads, R] float32.
        rotation: Of the same T positions.

    Returns:
        The same shape, still interleaved.
    """
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = rotation.cos, rotation.sin
    if x.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def softmax_scale(config: ModelConfig) -> float:
    """Give the factor on attention scores: 1/sqrt(head width), times mscale squared with YaRN.

    The square is right: cos and sin keep their length in these models, so query and key each owe one mscale.
    transformers' V2 class left it out from 4.54.0 to 4.57.6.

    Source: DeepSeek-V3 inference/model.py, MLA.
    """
    scale: float = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= _mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def frequencies(config: ModelConfig) -> Tensor:
    """Give the angle per position of each pair, [P] float32.

    Source: DeepSeek-V3 inference/model.py, precompute_freqs_cis; YaRN, arXiv 2309.00071.
    """
    dim, base = config.qk_rope_head_dim, config.rope_theta
    frequency_P = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return frequency_P
    low, high = _ramp_ends(dim, base, yarn)
    pair_P = torch.arange(dim // 2, dtype=torch.float32)
    slowed_P = ((pair_P - low) / (high - low)).clamp(0, 1)
    return frequency_P / yarn.factor * slowed_P + frequency_P * (1 - slowed_P)


def _ramp_ends(dim: int, base: float, yarn: YarnScaling) -> tuple[float, float]:
    """Give the pair up to which frequencies stay and the pair from which they are divided by the factor."""

    def pair_of(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    # With beta_fast = beta_slow, as in Kimi-K2, the ends are one pair apart or meet; where they meet, 0/0 waits.
    return low, high + 0.001 if low == high else high


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
