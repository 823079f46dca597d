"""Multi-head latent attention (MLA) in absorbed form, over the latent KV cache.

Keys and values are never built. ``kv_b_proj`` turns a latent c into a head's key W_k c and value W_v c, so
the score q . (W_k c) is (q W_k) . c, and the output W_v (sum of p c) needs one expansion per query instead of
one per cached token. The plain form is in tests/reference. This file must not know experts or sampling.

Shapes: T new tokens, S cached tokens with the new ones last, D hidden, H heads, h heads of one group,
N key part without position (qk_nope_head_dim), R rotary part (qk_rope_head_dim), V value (v_head_dim),
C latent (kv_lora_rank).
"""

import torch
from torch import Tensor

from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.fp8 import dequantize, linear, round_activation
from runner.norm import rms_norm
from runner.parameters import Parameters
from runner.rope import Rotation, rotate, softmax_scale

LOW_RANK_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm. DeepSeek's modelling code, its inference code and transformers all
build them without passing ``rms_norm_eps``, so Moonlight's 1e-5 holds for its other norms only."""

_SCORE_ELEMENTS = 1 << 24
"""Attention scores of one group of heads, 64 MiB of float32; three such tensors live at once. A single head is never
cut, so a long prefill over a long context takes more: 128 MiB each for 512 tokens at 65,536 positions."""


class Attention:
    """The attention of one layer; weights are fetched at each call."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int, *, dtype: torch.dtype) -> None:
        self._config = config
        self._parameters = parameters
        self._layer = layer
        self._prefix = f"model.layers.{layer}.self_attn"
        self._dtype = dtype
        self._scale = softmax_scale(config)

    def __call__(self, x_TD: Tensor, cache: LatentCache, rotation: Rotation) -> Tensor:
        """Attend from T new tokens to themselves and everything before.

        Args:
            x_TD: [T, D] float32, normalised.
            cache: Written at this layer; the caller advances it after the last layer.
            rotation: Of the T new positions.

        Returns:
            [T, D] float32.
        """
        config = self._config
        q_THQ = self._queries(x_TD)
        q_nope_THN, q_pe_THR = q_THQ[..., : config.qk_nope_head_dim], q_THQ[..., config.qk_nope_head_dim :]
        c_TC, k_pe_TR = self._latents(x_TD)
        c_SC, k_pe_SR = cache.write(self._layer, c_TC, rotate(k_pe_TR, rotation))
        heads_THV = self._attend(q_nope_THN, rotate(q_pe_THR, rotation), c_SC, k_pe_SR)
        width = config.num_attention_heads * config.v_head_dim
        return self._linear(heads_THV.flatten(1), "o_proj", config.hidden_size, width)

    def _linear(self, x_TI: Tensor, name: str, rows: int, columns: int) -> Tensor:
        return linear(x_TI, self._parameters.matrix(f"{self._prefix}.{name}", rows, columns), dtype=self._dtype)

    def _queries(self, x_TD: Tensor) -> Tensor:
        """Give [T, H, N+R] queries, before rotation."""
        config, rank = self._config, self._config.q_lora_rank
        width = config.num_attention_heads * config.qk_head_dim
        if rank is None:
            q_TQ = self._linear(x_TD, "q_proj", width, config.hidden_size)
        else:
            low_TQ = self._linear(x_TD, "q_a_proj", rank, config.hidden_size)
            weight = self._parameters.vector(f"{self._prefix}.q_a_layernorm.weight", rank)
            q_TQ = self._linear(rms_norm(low_TQ, weight, LOW_RANK_EPS), "q_b_proj", width, rank)
        return q_TQ.view(-1, config.num_attention_heads, config.qk_head_dim)

    def _latents(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Give the normalised latents [T, C] and the shared rotary key [T, R]: no norm, not yet rotated."""
        rank, rotary = self._config.kv_lora_rank, self._config.qk_rope_head_dim
        both = self._linear(x_TD, "kv_a_proj_with_mqa", rank + rotary, self._config.hidden_size)
        weight = self._parameters.vector(f"{self._prefix}.kv_a_layernorm.weight", rank)
        return rms_norm(both[:, :rank], weight, LOW_RANK_EPS), both[:, rank:]

    def _attend(self, q_nope_THN: Tensor, q_pe_THR: Tensor, c_SC: Tensor, k_pe_SR: Tensor) -> Tensor:
        config = self._config
        heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        rows = heads * (nope + value)
        kv_b = self._parameters.matrix(f"{self._prefix}.kv_b_proj", rows, config.kv_lora_rank)
        # Expanded whole, once for both of its uses; nothing else is while it lives.
        kv_b_HBC = dequantize(kv_b).view(heads, nope + value, config.kv_lora_rank)
        return attend_absorbed(q_nope_THN, q_pe_THR, c_SC, k_pe_SR, kv_b_HBC, scale=self._scale, dtype=self._dtype)


def attend_absorbed(
    q_nope_THN: Tensor,
    q_pe_THR: Tensor,
    c_SC: Tensor,
    k_pe_SR: Tensor,
    kv_b_HBC: Tensor,
    *,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attend causally from the last T of S positions, heads in groups.

    Args:
        q_nope_THN: [T, H, N] float32, queries against the latent part.
        q_pe_THR: [T, H, R] float32, rotated.
        c_SC: [S, C] float32, normalised latents.
        k_pe_SR: [S, R] float32, rotated, shared by all heads.
        kv_b_HBC: [H, N+V, C] float32. The rows of each head are its key part, then its value part.
        scale: On the scores, before the softmax.
        dtype: bfloat16 rounds what enters the two products with ``kv_b``; scores and softmax stay float32.

    Returns:
        [T, H, V] float32.

    Source: DeepSeek-V3 inference/model.py, MLA with attn_impl "absorb".
    """
    tokens, heads, nope = q_nope_THN.shape
    cached = c_SC.shape[0]
    w_k_HNC, w_v_HVC = kv_b_HBC[:, :nope], kv_b_HBC[:, nope:]
    q_nope_HTN = round_activation(q_nope_THN, dtype).transpose(0, 1)
    q_pe_HTR = q_pe_THR.transpose(0, 1)
    position_T = torch.arange(cached - tokens, cached).unsqueeze(1)
    later_TS = torch.arange(cached) > position_T
    out_THV = q_nope_THN.new_empty(tokens, heads, w_v_HVC.shape[1])
    step = max(1, _SCORE_ELEMENTS // (tokens * cached))
    for begin in range(0, heads, step):
        group = slice(begin, begin + step)
        q_hTC = torch.bmm(q_nope_HTN[group], w_k_HNC[group])
        score_hTS = (q_hTC @ c_SC.T + q_pe_HTR[group] @ k_pe_SR.T).mul_(scale)
        probability_hTS = score_hTS.masked_fill_(later_TS, -torch.inf).softmax(dim=-1)
        mixed_hTC = round_activation(probability_hTS @ c_SC, dtype)
        out_THV[:, group] = torch.bmm(mixed_hTC, w_v_HVC[group].mT).transpose(0, 1)
    return out_THV
