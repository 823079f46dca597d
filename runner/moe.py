"""Feed-forward parts: the SwiGLU MLP, and the mixture of experts.

Tokens are grouped by expert, so a call asks for each chosen expert's weights once, and never for those of an
expert that nobody chose. This file must not know attention, files or text.

Shapes: T tokens, D hidden, F width of an MLP, K experts per token.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from runner import kernels
from runner.config import ModelConfig
from runner.fp8 import Matrix, check, linear, round_activation
from runner.kernels import Expert, Kernels
from runner.parameters import Parameters
from runner.router import Router, Routing

Observer = Callable[[int, Tensor], None]
"""Called as observer(layer, expert_ids) once per MoE layer and pass, before the experts run."""


def swiglu(
    x_TD: Tensor, parameters: Parameters, prefix: str, width: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Give down_proj(silu(gate_proj x) * up_proj x) with the weights below ``prefix``.

    Args:
        x_TD: [T, D] float32.
        parameters: Where the three matrices are.
        prefix: Such as "model.layers.3.mlp.experts.17".
        width: F, rows of gate_proj and up_proj.
        dtype: As for ``linear``.

    Returns:
        [T, D] float32.
    """
    gate, up, down = _matrices(parameters, prefix, width, x_TD.shape[1])
    if (compiled := kernels.active()) is not None:
        return compiled.experts([Expert(gate=gate, up=up, down=down)], round_activation(x_TD, dtype), dtype=dtype)
    return linear(silu(linear(x_TD, gate, dtype=dtype)).mul_(linear(x_TD, up, dtype=dtype)), down, dtype=dtype)


def _matrices(parameters: Parameters, prefix: str, width: int, hidden: int) -> tuple[Matrix, Matrix, Matrix]:
    gate, up = (parameters.matrix(f"{prefix}.{name}", width, hidden) for name in ("gate_proj", "up_proj"))
    matrices = gate, up, parameters.matrix(f"{prefix}.down_proj", hidden, width)
    for matrix in matrices:
        check(matrix)
    return matrices


class MoE:
    """Routed and shared experts of one layer."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int, *, dtype: torch.dtype) -> None:
        self._parameters = parameters
        self._layer = layer
        self._prefix = f"model.layers.{layer}.mlp"
        self._width = config.moe_intermediate_size
        # Several shared experts are stored as one MLP of their widths' sum.
        self._shared_width = config.moe_intermediate_size * config.n_shared_experts
        self._dtype = dtype
        self._router = Router(config, parameters, layer)

    def __call__(self, x_TD: Tensor, observer: Observer | None = None) -> Tensor:
        """Give the weighted sum of the chosen experts, by ascending id, plus the shared; [T, D] float32."""
        routing = self._router(x_TD)
        if observer is not None:
            observer(self._layer, routing.expert_ids)
        compiled = kernels.active()
        return self._torch_sum(x_TD, routing) if compiled is None else self._compiled_sum(compiled, x_TD, routing)

    def _compiled_sum(self, compiled: Kernels, x_TD: Tensor, routing: Routing) -> Tensor:
        hidden, experts = x_TD.shape[1], []
        for expert, token, weight in _by_expert(routing):
            prefix = f"{self._prefix}.experts.{expert}"
            gate, up, down = _matrices(self._parameters, prefix, self._width, hidden)
            experts.append(Expert(gate=gate, up=up, down=down, token=token, weight=weight))
        if self._shared_width:
            prefix = f"{self._prefix}.shared_experts"
            gate, up, down = _matrices(self._parameters, prefix, self._shared_width, hidden)
            experts.append(Expert(gate=gate, up=up, down=down))
        return compiled.experts(experts, round_activation(x_TD, self._dtype), dtype=self._dtype)

    def _torch_sum(self, x_TD: Tensor, routing: Routing) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        for expert, token, weight in _by_expert(routing):
            prefix = f"{self._prefix}.experts.{expert}"
            y = swiglu(x_TD[token], self._parameters, prefix, self._width, dtype=self._dtype)
            out_TD.index_add_(0, token, y * weight.unsqueeze(1))
        if self._shared_width:
            prefix = f"{self._prefix}.shared_experts"
            out_TD += swiglu(x_TD, self._parameters, prefix, self._shared_width, dtype=self._dtype)
        return out_TD


def _by_expert(routing: Routing) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each chosen expert by ascending id, with its tokens and their weights."""
    for expert in sorted(set(routing.expert_ids.flatten().tolist())):
        token, choice = (routing.expert_ids == expert).nonzero(as_tuple=True)
        yield expert, token, routing.weights[token, choice]
