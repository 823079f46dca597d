"""Sigmoid routing with a correction bias inside groups, routed experts and a shared one, for training.

The experts of a layer are stacked and keep their input dimension first (`experts_gate_up` [E, D, 2W], `experts_down`
[E, W, D]), which is how the grouped product wants them. It knows one layer's experts; it must not know layers.

Shape legend: B sequences, T positions, N = B*T tokens, D hidden size, H heads, E experts, W expert width, K experts
per token, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.demo.parts import BF16, Mlp, NetworkConfig, matrix, output_std

# oneDNN compiles a kernel for each new shape (milliseconds each) and routing makes new group sizes at every step, so
# groups are filled up with rows that nobody reads to a multiple of this: few shapes occur.
_GROUP_ROWS = 128


class _Dispatch(torch.autograd.Function):
    """Copy token rows into expert order; backward is a gather and a sum instead of a slow scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot_of: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(slot_of)
        ctx.per_token = per_token
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (slot_of,) = ctx.saved_tensors
        return grad.index_select(0, slot_of).view(-1, ctx.per_token, grad.shape[-1]).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    """Bring expert outputs back into token order; rows that only fill up a group are dropped."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slot_of: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of)
        ctx.rows = len(y)
        return y.index_select(0, slot_of)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (slot_of,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[-1]).index_copy_(0, slot_of, grad), None


class MoE(nn.Module):
    """Routed experts, chosen inside the best groups, plus a shared expert that sees every token.

    Attributes:
        e_score_correction_bias: [E] float32, used for the choice only; no gradient reaches it, `balance` moves it.
        load: [E] float32, tokens sent to each expert since somebody last set it to zero.
    """

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = matrix(experts, hidden)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)
        self.experts_gate_up = matrix(experts, hidden, 2 * width)
        self.experts_down = matrix(experts, width, hidden, std=output_std(config))
        self.shared_experts = Mlp(config, config.n_shared_experts * width)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for tokens x [N, D] float32: their weights [N, K] float32 and ids [N, K]."""
        config = self.config
        scores = torch.sigmoid(F.linear(x, self.gate))
        with torch.no_grad():
            biased = (scores + self.e_score_correction_bias).view(len(x), config.n_group, -1)
            groups = biased.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
            kept = torch.zeros(biased.shape[:2], dtype=torch.bool).scatter_(1, groups, True)
            masked = biased.masked_fill(~kept.unsqueeze(-1), -math.inf).flatten(1)
            ids = masked.topk(config.num_experts_per_tok, -1).indices
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor, ids

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] float32, normed, to [B, T, D] bfloat16."""
        tokens = x.flatten(0, 1)
        weights, ids = self.route(tokens)
        flat, per_token = ids.flatten(), self.config.num_experts_per_tok
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.config.n_routed_experts)
        self.load += counts
        padded = (counts + _GROUP_ROWS - 1) // _GROUP_ROWS * _GROUP_ROWS
        ends = padded.cumsum(0)
        # Where each (token, expert) pair goes: its place among the sorted pairs, moved on by the filling before it.
        slots = torch.arange(len(order)) + (ends - padded - (counts.cumsum(0) - counts))[flat[order]]
        slot_of = torch.empty_like(order)
        slot_of[order] = slots
        source = torch.zeros(int(ends[-1]), dtype=torch.long)
        source[slots] = order // per_token
        ends = ends.to(torch.int32)
        rows = _Dispatch.apply(tokens.to(BF16), source, slot_of, per_token)
        gate, up = torch._grouped_mm(rows, self.experts_gate_up.to(BF16), ends).chunk(2, -1)
        rows = torch._grouped_mm(F.silu(gate) * up, self.experts_down.to(BF16), ends)
        outputs = _Collect.apply(rows, slot_of).view(-1, per_token, tokens.shape[-1])
        routed = torch.bmm(weights.to(BF16).unsqueeze(1), outputs).squeeze(1)
        return routed.view(x.shape) + self.shared_experts(x)

    @torch.no_grad()
    def balance(self, step: float) -> None:
        """Move the correction bias against the load error, as DeepSeek-V3 does instead of an auxiliary loss.

        Only differences between experts matter, so the mean is taken out again: otherwise all biases drift away
        from the scores, and with them the precision of their sum.
        """
        self.e_score_correction_bias += step * torch.sign(self.load.mean() - self.load)
        self.e_score_correction_bias -= self.e_score_correction_bias.mean()
        self.load.zero_()
