"""Feed-forward parts: the SwiGLU MLP, and the mixture of experts.

Tokens are grouped by expert, so a call asks for each chosen expert's weights once, and never for those of an
expert that nobody chose. This file must not know attention, files or text.

Shapes: T tokens, t tokens of one expert, D hidden, F width of an MLP, K experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import closing

import torch
from torch import Tensor
from torch.nn.functional import silu

from runner import kernels
from runner.config import ModelConfig
from runner.fp8 import Mlp, linear, round_activation
from runner.kernels import Part
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
        prefix: Such as "model.layers.3.mlp.shared_experts".
        width: F, rows of gate_proj and up_proj.
        dtype: As for ``linear``.

    Returns:
        [T, D] float32.
    """
    return _mlps([(parameters.mlp(prefix, width, x_TD.shape[1]), None)], round_activation(x_TD, dtype), dtype)[0]


def _mlps(experts: list[tuple[Mlp, Tensor | None]], x_TD: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Give what each MLP makes of its rows of x, which is rounded already."""
    if (compiled := kernels.active()) is not None:
        return compiled.experts(experts, x_TD, dtype=dtype)
    found = []
    for mlp, token in experts:
        x = x_TD if token is None else x_TD[token]
        found.append(linear(silu(linear(x, mlp.gate)).mul_(linear(x, mlp.up)), mlp.down, dtype=dtype))
    return found


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
        """Give the weighted sum of the chosen experts, by ascending id, plus the shared; [T, D] float32.

        Each expert is computed when its weights are there, in whatever order; the sum keeps its own.
        """
        routing = self._router(x_TD)
        if observer is not None:
            observer(self._layer, routing.expert_ids)
        chosen = {expert: (token, weight) for expert, token, weight in _by_expert(routing)}
        x, hidden = round_activation(x_TD, self._dtype), x_TD.shape[1]
        out_TD = torch.zeros_like(x_TD)
        groups = self._parameters.experts(self._layer, list(chosen), self._width, hidden)
        shared: Tensor | None = None
        with closing(groups):
            for group in groups:
                found: dict[int, Tensor] = {}
                for some in group:
                    work = [(mlp, chosen[expert][0]) for expert, mlp in some]
                    if shared is None and self._shared_width:
                        # While the first of the others are on their way.
                        prefix = f"{self._prefix}.shared_experts"
                        shared, *rest = _mlps([(self._parameters.mlp(prefix, self._shared_width, hidden), None), *work], x, self._dtype)
                    else:
                        rest = _mlps(work, x, self._dtype)
                    found.update(zip((expert for expert, _ in some), rest, strict=True))
                _add([Part(y=found[expert], token=chosen[expert][0], weight=chosen[expert][1]) for expert in sorted(found)], out_TD)
        if shared is not None:
            _add([Part(y=shared)], out_TD)
        return out_TD


def _add(parts: list[Part], out_TD: Tensor) -> None:
    """Add parts to a sum, in their order."""
    if (compiled := kernels.active()) is not None:
        compiled.add(parts, out_TD)
        return
    for part in parts:
        y = part.y if part.weight is None else part.y * part.weight.unsqueeze(1)
        if part.token is None:
            out_TD += y
        else:
            out_TD.index_add_(0, part.token, y)


def _by_expert(routing: Routing) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each chosen expert by ascending id, with its tokens and their weights."""
    # Stable, so that an expert's tokens keep their order.
    flat = routing.expert_ids.flatten()
    order = flat.argsort(stable=True)
    experts, counts = flat[order].unique_consecutive(return_counts=True)
    tokens, weights = order // routing.expert_ids.shape[1], routing.weights.flatten()[order]
    sizes = counts.tolist()
    yield from zip(experts.tolist(), tokens.split(sizes), weights.split(sizes), strict=True)
