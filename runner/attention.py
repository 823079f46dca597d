"""Multi-head latent attention (MLA) in absorbed form, over the latent KV cache.

Keys and values are never built. ``kv_b_proj`` turns a latent c into a head's key W_k c and value W_v c, so
the score q . (W_k c) is (q W_k) . c, and the output W_v (sum of p c) needs one expansion per query instead of
one per cached token. The plain form is in tests/reference. This file must not know experts or sampling.

Shapes: T new tokens, S cached tokens with the new ones last, D hidden, H heads, h heads of one group,
N key part without position (qk_nope_head_dim), R rotary part (qk_rope_head_dim), V value (v_head_dim),
C latent (kv_lora_rank).
"""

from dataclasses import replace

import torch
from torch import Tensor

from runner import kernels
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.fp8 import Matrix, check, dequantize, linear, round_activation
from runner.norm import rms_norm
from runner.parameters import Parameters
from runner.rope import Rotation, rotate, softmax_scale

LOW_RANK_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm. DeepSeek's modelling code, its inference code and transformers all
build them without passing ``rms_norm_eps``, so Moonlight's 1e-5 holds for its other norms only."""

_SCORE_ELEMENTS = 1 << 24
"""Attention scores of one group of heads, 64 MiB of float32; three such tensors live at once. A single head is never
cut, so a long prefill over a long context takes more: 128 MiB each for 512 tokens at 65,536 positions."""

_EXPANDED_ELEMENTS = 1 << 22
"""Elements of ``kv_b_proj`` that torch expands at once, 16 MiB of float32; a single head is never cut."""


class Attention:
    """The attention of one layer; its weights are fetched by the first call, and kept in their stored dtype."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int, *, dtype: torch.dtype) -> None:
        self._config = config
        self._parameters = parameters
        self._layer = layer
        self._prefix = f"model.layers.{layer}.self_attn"
        self._dtype = dtype
        self._scale = softmax_scale(config)
        self._matrices: dict[str, Matrix] = {}
        self._vectors: dict[str, Tensor] = {}

    def __call__(self, x_TD: Tensor, cache: LatentCache, rotation: Rotation, behind: int = 0) -> Tensor:
        """Attend from T new tokens to themselves and everything before.

        Args:
            x_TD: [T, D] float32, normalised.
            cache: Written at this layer; the caller advances it after the last layer.
            rotation: Of the T new positions.
            behind: Tokens of the same pass that were here before these.

        Returns:
            [T, D] float32.
        """
        config = self._config
        q_THQ = self._queries(x_TD)
        c_SC, k_pe_SR = self._latents(x_TD, cache, rotation, behind)
        heads_THV = self._attend(q_THQ, rotation, c_SC, k_pe_SR)
        width = config.num_attention_heads * config.v_head_dim
        return self._linear(heads_THV.flatten(1), "o_proj", config.hidden_size, width)

    def _matrix(self, name: str, rows: int, columns: int) -> Matrix:
        matrix = self._matrices.get(name)
        if matrix is None:
            matrix = self._matrices[name] = self._parameters.matrix(f"{self._prefix}.{name}", rows, columns)
        return matrix

    def _kv_b(self) -> Matrix:
        config, matrix = self._config, self._matrices.get("kv_b_proj")
        if matrix is None:
            sizes = config.qk_nope_head_dim, config.v_head_dim
            matrix = self._parameters.kv_b(self._prefix, config.num_attention_heads, sizes, config.kv_lora_rank)
            self._matrices["kv_b_proj"] = matrix
        return matrix

    def _linear(self, x_TI: Tensor, name: str, rows: int, columns: int) -> Tensor:
        return linear(x_TI, self._matrix(name, rows, columns), dtype=self._dtype)

    def _vector(self, name: str, size: int) -> Tensor:
        vector = self._vectors.get(name)
        if vector is None:
            vector = self._vectors[name] = self._parameters.vector(f"{self._prefix}.{name}.weight", size)
        return vector

    def _queries(self, x_TD: Tensor) -> Tensor:
        """Give [T, H, N+R] queries, before rotation."""
        config, rank = self._config, self._config.q_lora_rank
        width = config.num_attention_heads * config.qk_head_dim
        if rank is None:
            q_TQ = self._linear(x_TD, "q_proj", width, config.hidden_size)
        else:
            low_TQ = self._linear(x_TD, "q_a_proj", rank, config.hidden_size)
            normed_TQ = rms_norm(low_TQ, self._vector("q_a_layernorm", rank), LOW_RANK_EPS)
            q_TQ = self._linear(normed_TQ, "q_b_proj", width, rank)
        return q_TQ.view(-1, config.num_attention_heads, config.qk_head_dim)

    def _latents(self, x_TD: Tensor, cache: LatentCache, rotation: Rotation, behind: int) -> tuple[Tensor, Tensor]:
        """Give the cache with the new tokens in it: normed latents [S, C], and the rotated keys [S, R] without norm."""
        rank, rotary = self._config.kv_lora_rank, self._config.qk_rope_head_dim
        both_TX = self._linear(x_TD, "kv_a_proj_with_mqa", rank + rotary, self._config.hidden_size)
        weight_C = self._vector("kv_a_layernorm", rank)
        if (compiled := kernels.active()) is None:
            c_TC = rms_norm(both_TX[:, :rank], weight_C, LOW_RANK_EPS)
            return cache.write(self._layer, c_TC, rotate(both_TX[:, rank:], rotation), behind)
        c_SC, k_pe_SR = cache.make_room(self._layer, x_TD.shape[0], behind)
        compiled.latents(both_TX, weight_C, LOW_RANK_EPS, (rotation.cos, rotation.sin), c_SC, k_pe_SR)
        return c_SC, k_pe_SR

    def _attend(self, q_THQ: Tensor, rotation: Rotation, c_SC: Tensor, k_pe_SR: Tensor) -> Tensor:
        nope, kv_b = self._config.qk_nope_head_dim, self._kv_b()
        check(kv_b)
        compiled = kernels.active()
        # An encoding that no kernel reads is expanded a few heads at a time, not as a whole: V3's would take 64 MiB.
        if compiled is not None and kernels.multiplies(kv_b):
            turn = (rotation.cos, rotation.sin)
            return compiled.attend(q_THQ, turn, c_SC, k_pe_SR, kv_b, scale=self._scale, dtype=self._dtype)
        q_pe_THR = rotate(q_THQ[..., nope:], rotation)
        return attend_absorbed(q_THQ[..., :nope], q_pe_THR, c_SC, k_pe_SR, kv_b, scale=self._scale, dtype=self._dtype)


def attend_absorbed(
    q_nope_THN: Tensor,
    q_pe_THR: Tensor,
    c_SC: Tensor,
    k_pe_SR: Tensor,
    kv_b: Matrix,
    *,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attend causally from the last T of S positions with torch alone, heads in groups.

    Args:
        q_nope_THN: [T, H, N] float32, queries against the latent part.
        q_pe_THR: [T, H, R] float32, rotated.
        c_SC: [S, C] float32, normalised latents.
        k_pe_SR: [S, R] float32, rotated, shared by all heads.
        kv_b: [H * (N+V), C], checked. The rows of each head are its key part, then its value part.
        scale: On the scores, before the softmax.
        dtype: bfloat16 rounds what enters the two products with ``kv_b``; scores and softmax stay float32.

    Returns:
        [T, H, V] float32.

    Source: DeepSeek-V3 inference/model.py, MLA with attn_impl "absorb".
    """
    tokens, heads, nope = q_nope_THN.shape
    cached = c_SC.shape[0]
    (rows, latent), q_pe_HTR = kv_b.shape, q_pe_THR.transpose(0, 1)
    head_rows = rows // heads
    q_nope_HTN = round_activation(q_nope_THN, dtype).transpose(0, 1)
    position_T = torch.arange(cached - tokens, cached).unsqueeze(1)
    later_TS = torch.arange(cached) > position_T
    out_THV = q_nope_THN.new_empty(tokens, heads, head_rows - nope)
    step = max(1, min(_SCORE_ELEMENTS // (tokens * cached), _EXPANDED_ELEMENTS // (head_rows * latent)))
    for begin in range(0, heads, step):
        group = slice(begin, begin + step)
        kv_b_hBC = _expand_rows(kv_b, begin * head_rows, min(begin + step, heads) * head_rows)
        kv_b_hBC = kv_b_hBC.view(-1, head_rows, latent)
        q_hTC = torch.bmm(q_nope_HTN[group], kv_b_hBC[:, :nope])
        score_hTS = (q_hTC @ c_SC.T + q_pe_HTR[group] @ k_pe_SR.T).mul_(scale)
        probability_hTS = score_hTS.masked_fill_(later_TS, -torch.inf).softmax(dim=-1)
        mixed_hTC = round_activation(probability_hTS @ c_SC, dtype)
        out_THV[:, group] = torch.bmm(mixed_hTC, kv_b_hBC[:, nope:].mT).transpose(0, 1)
        del kv_b_hBC  # before the next one is made
    return out_THV


def _expand_rows(matrix: Matrix, begin: int, end: int) -> Tensor:
    """Give rows of a matrix as float32; its blocks need not begin where the rows do."""
    block_rows = matrix.block[0]
    first = begin // block_rows * block_rows
    scale = None if matrix.scale is None else matrix.scale[first // block_rows : -(-end // block_rows)]
    return dequantize(replace(matrix, weight=matrix.weight[first:end], scale=scale))[begin - first :]
