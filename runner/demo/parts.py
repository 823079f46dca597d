"""Sizes and small parts of the training network: its configuration, products, norms and the SwiGLU network.

Weights, norms and the residual stream are float32; matrix products are bfloat16.

It must not know how the parts are put together.

Shape legend: B sequences, T positions, N = B*T tokens, D hidden size, H heads, E experts, W expert width, K experts
per token, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BF16 = torch.bfloat16
RMS_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """Sizes of the network, with the names of config.json."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    intermediate_size: int = 704
    moe_intermediate_size: int = 64
    n_routed_experts: int = 64
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    num_attention_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 48
    qk_rope_head_dim: int = 16
    v_head_dim: int = 64
    rope_theta: int = 10000
    rope_factor: int = 4
    original_max_position_embeddings: int = 512
    max_position_embeddings: int = 2048
    beta_fast: int = 32
    beta_slow: int = 1


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [..., I] by weight [O, I] in bfloat16 -> [..., O] bfloat16."""
    return F.linear(x.to(BF16), weight.to(BF16))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, RMS_NORM_EPS)


def matrix(*shape: int, std: float = 0.02) -> nn.Parameter:
    """Give a parameter of normal random numbers."""
    return nn.Parameter(torch.randn(*shape) * std)


def ones(size: int) -> nn.Parameter:
    """Give the weight of a norm."""
    return nn.Parameter(torch.ones(size))


def output_std(config: NetworkConfig) -> float:
    """Smaller start for matrices that write to the residual stream, so that depth does not add up."""
    return 0.02 / math.sqrt(2 * config.num_hidden_layers)


class Mlp(nn.Module):
    """SwiGLU feed-forward network of a given width."""

    def __init__(self, config: NetworkConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = matrix(width, config.hidden_size)
        self.up_proj = matrix(width, config.hidden_size)
        self.down_proj = matrix(config.hidden_size, width, std=output_std(config))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D] bfloat16."""
        return linear(F.silu(linear(x, self.gate_proj)) * linear(x, self.up_proj), self.down_proj)
