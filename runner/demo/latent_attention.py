"""Multi-head latent attention with YaRN, for training: no cache, and in the plain (not absorbed) form.

It knows one layer's attention; it must not know layers.

Shape legend: B sequences, T positions, N = B*T tokens, D hidden size, H heads, E experts, W expert width, K experts
per token, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from runner.demo.parts import BF16, NetworkConfig, linear, matrix, ones, output_std, rms_norm

# Queries are taken this many at a time, so that a long causal sequence does not pay for the upper triangle.
_QUERY_ROWS = 512


class Rope(nn.Module):
    """Rotary embedding with YaRN, at every sequence length. Pairs are interleaved, as in the checkpoints.

    Source: DeepSeek-V3, inference/model.py, precompute_freqs_cis.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        size, theta, original = config.qk_rope_head_dim, config.rope_theta, config.original_max_position_embeddings
        frequencies = theta ** -(torch.arange(0, size, 2).float() / size)

        def pair_turning(turns: float) -> float:
            """The (fractional) pair that makes so many turns over the original context."""
            return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_turning(config.beta_fast)), 0)
        high = min(math.ceil(pair_turning(config.beta_slow)), size - 1)
        slow = ((torch.arange(size // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequencies = frequencies / config.rope_factor * slow + frequencies * (1 - slow)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x [..., T, R] by the positions 0 .. T - 1."""
        length = x.shape[-2]
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos[:length], self.sin[:length]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(BF16)


class Attention(nn.Module):
    """Multi-head latent attention, in the plain (not absorbed) form."""

    def __init__(self, config: NetworkConfig, rope: Rope) -> None:
        super().__init__()
        self.config, self._rope = config, (rope,)  # a tuple hides the shared module from the parameter names
        heads, nope, rotary, value = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        hidden, q_rank, kv_rank = config.hidden_size, config.q_lora_rank, config.kv_lora_rank
        self.q_a_proj = matrix(q_rank, hidden)
        self.q_a_layernorm = ones(q_rank)
        self.q_b_proj = matrix(heads * (nope + rotary), q_rank, std=0.5 * q_rank**-0.5)
        self.kv_a_proj_with_mqa = matrix(kv_rank + rotary, hidden)
        self.kv_a_layernorm = ones(kv_rank)
        self.kv_b_proj = matrix(heads * (nope + value), kv_rank, std=0.5 * kv_rank**-0.5)
        self.o_proj = matrix(hidden, heads * value, std=output_std(config))
        mscale = 0.1 * math.log(config.rope_factor) + 1
        self.scale = (nope + rotary) ** -0.5 * mscale**2

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] float32, normed, to [B, T, D] bfloat16."""
        config, (rope,) = self.config, self._rope
        batch, length, _ = x.shape
        heads, nope, rotary, value = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        q = linear(rms_norm(linear(x, self.q_a_proj), self.q_a_layernorm), self.q_b_proj)
        q_nope, q_pe = q.view(batch, length, heads, -1).transpose(1, 2).split((nope, rotary), -1)
        latent, k_pe = linear(x, self.kv_a_proj_with_mqa).split((config.kv_lora_rank, rotary), -1)
        kv = linear(rms_norm(latent, self.kv_a_layernorm), self.kv_b_proj)
        k_nope, v = kv.view(batch, length, heads, -1).transpose(1, 2).split((nope, value), -1)
        q = torch.cat((q_nope, rope(q_pe)), -1).flatten(0, 1)
        k = torch.cat((k_nope, rope(k_pe.unsqueeze(1)).expand(-1, heads, -1, -1)), -1).flatten(0, 1)
        v = v.reshape(batch * heads, length, value)
        mask = torch.full((length, length), -1e4, dtype=BF16).triu_(1)
        parts = []
        # Two plain products and a softmax: on CPUs twice as fast, with backward, as scaled_dot_product_attention.
        for start in range(0, length, _QUERY_ROWS):
            stop = min(start + _QUERY_ROWS, length)
            rows = mask[start:stop, :stop].expand(batch * heads, -1, -1)
            scores = torch.baddbmm(rows, q[:, start:stop], k[:, :stop].mT, alpha=self.scale)
            parts.append(torch.bmm(torch.softmax(scores, -1), v[:, :stop]))
        y = torch.cat(parts, 1).view(batch, heads, length, value).transpose(1, 2)
        return linear(y.reshape(batch, length, -1), self.o_proj)
