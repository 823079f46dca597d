"""The demo model as a network that can be trained: DeepSeek-V3's architecture at 1/40,000 of its size.

Latent attention with YaRN, routed and shared experts, one multi-token-prediction (MTP) layer. Parameters have the
published names, as far as one parameter is one published tensor.

It must not know text, files or the optimiser. It is for training only: no cache, no generation, no FP8.

Shape legend: B sequences, T positions, N = B*T tokens, D hidden size, H heads, E experts, W expert width, K experts
per token, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.demo.latent_attention import Attention, Rope
from runner.demo.mixture import MoE
from runner.demo.parts import BF16, Mlp, NetworkConfig, linear, matrix, ones, rms_norm


class Layer(nn.Module):
    """One decoder layer: attention and a dense or MoE network, both behind a norm and beside the residual stream."""

    def __init__(self, config: NetworkConfig, rope: Rope, *, moe: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, rope)
        self.mlp = MoE(config) if moe else Mlp(config, config.intermediate_size)
        self.input_layernorm = ones(config.hidden_size)
        self.post_attention_layernorm = ones(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream [B, T, D] float32 to itself after this layer."""
        x = x + self.self_attn(rms_norm(x, self.input_layernorm))
        return x + self.mlp(rms_norm(x, self.post_attention_layernorm))


class Network(nn.Module):
    """The whole model. `layers[num_hidden_layers]` is the MTP layer, as in the checkpoints."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        rope = Rope(config)
        self.embed_tokens = matrix(config.vocab_size, config.hidden_size)
        self.lm_head = matrix(config.vocab_size, config.hidden_size, std=0.01)
        self.norm = ones(config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, rope, moe=index >= config.first_k_dense_replace)
            for index in range(config.num_hidden_layers + 1)
        )
        self.enorm, self.hnorm, self.shared_head_norm = (ones(config.hidden_size) for _ in range(3))
        self.eh_proj = matrix(config.hidden_size, 2 * config.hidden_size)

    def moe_layers(self) -> dict[int, MoE]:
        """Every MoE by its layer index, the MTP layer's included."""
        return {index: layer.mlp for index, layer in enumerate(self.layers) if isinstance(layer.mlp, MoE)}

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Map token ids [B, T + 1] to two hidden states [B, T, D] float32 for `lm_head`.

        The first, at position t, predicts token t + 1. The second is the MTP layer's: it also sees token t + 1 and
        predicts token t + 2.
        """
        embedded = F.embedding(ids, self.embed_tokens)
        x = embedded[:, :-1]
        for layer in self.layers[:-1]:
            x = layer(x)
        hidden = rms_norm(x, self.norm)
        joined = torch.cat((rms_norm(embedded[:, 1:], self.enorm), rms_norm(hidden, self.hnorm)), -1)
        mtp = self.layers[-1](linear(joined, self.eh_proj).float())
        return hidden, rms_norm(mtp, self.shared_head_norm)


class _HeadLoss(torch.autograd.Function):
    """lm_head and cross entropy, a few rows at a time: the logits of a whole step would be hundreds of megabytes."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        hidden_bf16, weight_bf16 = hidden.to(BF16), weight.to(BF16)
        grad_hidden, grad_weight = torch.empty_like(hidden_bf16), torch.zeros_like(weight)
        loss, count = 0.0, len(targets)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            logits = (hidden_bf16[part] @ weight_bf16.T).float()
            target = targets[part].unsqueeze(1)
            top = logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, target)
            exps = logits.sub_(top).exp_()
            total = exps.sum(-1, keepdim=True)
            loss += (total.log() + top - chosen).sum().item()
            grad = exps.div_(total).scatter_add_(1, target, torch.full_like(chosen, -1.0)).mul_(1 / count).to(BF16)
            grad_hidden[part] = grad @ weight_bf16
            grad_weight += grad.T @ hidden_bf16[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return torch.tensor(loss / count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden * grad).float(), grad_weight * grad, None, None


def head_loss(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats of hidden [B, T, D] through lm_head [V, D] against targets [B, T]."""
    return _HeadLoss.apply(hidden.flatten(0, 1), lm_head, targets.flatten(), 1024)
