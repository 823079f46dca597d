"""Which experts a token goes to, and with what weight. Always float32: near ties flip with less.

Experts come back in ascending order of their id, so that sums over them run in one fixed order, and ties go
to the lowest id. Compiled where that could be built; torch's sigmoid gives a number other bits at the end of a tensor
than in its midst, so with torch alone a weight can depend on the tokens beside it, in its last bit. This file must not
know what an expert is.

Shapes: T tokens, D hidden, E routed experts, K experts per token, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runner import kernels
from runner.config import ModelConfig
from runner.fp8 import Matrix, linear
from runner.parameters import Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The choice for T tokens.

    Attributes:
        expert_ids: [T, K] int64, ascending in each row.
        weights: [T, K] float32, factor of each chosen expert's output.
    """

    expert_ids: Tensor
    weights: Tensor


class Router:
    """The router of one layer; weights are fetched by the first call."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        self._config = config
        self._parameters = parameters
        self._prefix = f"model.layers.{layer}.mlp.gate"
        self._gate: Matrix | None = None
        self._bias_E: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Routing:
        """Choose experts for [T, D] float32 tokens."""
        config, experts = self._config, self._config.n_routed_experts
        if self._gate is None:
            self._gate = self._parameters.matrix(self._prefix, experts, config.hidden_size)
            if config.topk_method == "noaux_tc":
                self._bias_E = self._parameters.vector(f"{self._prefix}.e_score_correction_bias", experts)
        logits_TE = linear(x_TD, self._gate)
        if (compiled := kernels.active()) is not None:
            return route_compiled(compiled, logits_TE, self._bias_E, config)
        if self._bias_E is None:
            return route_greedy(logits_TE, config)
        return route_noaux_tc(logits_TE, self._bias_E, config)


def route_compiled(compiled: kernels.Kernels, logits_TE: Tensor, bias_E: Tensor | None, config: ModelConfig) -> Routing:
    """Choose as `route_noaux_tc` with a bias, and as `route_greedy` without."""
    top, factor = config.num_experts_per_tok, config.routed_scaling_factor
    is_grouped = config.topk_method != "greedy"
    normalise = config.norm_topk_prob and (bias_E is not None or top > 1)
    ids_TK, weights_TK = compiled.route(
        logits_TE,
        bias_E,
        groups=(config.n_group, config.topk_group) if is_grouped else (1, 1),
        top=top,
        normalise=normalise,
        factor=1.0 if normalise and bias_E is None else factor,
    )
    return Routing(expert_ids=ids_TK, weights=weights_TK)


def route_noaux_tc(logits_TE: Tensor, bias_E: Tensor, config: ModelConfig) -> Routing:
    """Choose as DeepSeek-V3 does: sigmoid scores, a bias for the choice only, the best groups first.

    Groups that are left out get -inf, not 0.0 as in transformers 4.51 to 4.57.6: biased scores may be
    negative, and a zero would then win.

    Source: DeepSeek-V3 inference/model.py, Gate; modeling_deepseek.py, MoEGate (the 1e-20).
    """
    score_TE = logits_TE.sigmoid()
    choice_TE = score_TE + bias_E
    if config.n_group > 1:
        choice_TGe = choice_TE.view(-1, config.n_group, config.n_routed_experts // config.n_group)
        group_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)
        choice_TE = _keep_groups(choice_TGe, group_TG, config.topk_group, -torch.inf)
    ids_TK = _top(choice_TE, config.num_experts_per_tok)
    weight_TK = score_TE.gather(1, ids_TK)
    if config.norm_topk_prob:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return Routing(expert_ids=ids_TK, weights=weight_TK * config.routed_scaling_factor)


def route_greedy(logits_TE: Tensor, config: ModelConfig) -> Routing:
    """Choose as DeepSeek-V2 does: softmax scores, the groups with the best expert first, if grouped.

    With ``norm_topk_prob`` the weights sum to one and ``routed_scaling_factor`` is not applied: V2's own code
    has the two as alternatives. No published V2 model sets it, and transformers' V2 class (5.23) ignores it.

    Source: DeepSeek-V2 modeling_deepseek.py, MoEGate.
    """
    score_TE = logits_TE.softmax(dim=-1)
    if config.topk_method == "group_limited_greedy":
        score_TGe = score_TE.view(-1, config.n_group, config.n_routed_experts // config.n_group)
        # 0.0 is as good as -inf here: no softmax score is negative, and one that is zero adds nothing.
        score_TE = _keep_groups(score_TGe, score_TGe.amax(-1), config.topk_group, 0.0)
    ids_TK = _top(score_TE, config.num_experts_per_tok)
    weight_TK = score_TE.gather(1, ids_TK)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    else:
        weight_TK = weight_TK * config.routed_scaling_factor
    return Routing(expert_ids=ids_TK, weights=weight_TK)


def _keep_groups(choice_TGe: Tensor, group_TG: Tensor, count: int, masked: float) -> Tensor:
    """Give [T, E] choice scores in which all but the ``count`` best groups are ``masked``."""
    left_out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, _top(group_TG, count), False)
    return choice_TGe.masked_fill(left_out_TG.unsqueeze(-1), masked).flatten(1)


def _top(score: Tensor, count: int) -> Tensor:
    """Give the ids of the ``count`` largest of each row, ascending by id; ties go to the lowest id."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values
