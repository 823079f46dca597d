"""Feed-forward parts: the SwiGLU MLP, and the mixture of experts.

Tokens are grouped by expert, so a call asks for each chosen expert's weights once, and never for those of an
expert that nobody chose. This file must not know attention, files or text.

Shapes: T tokens, t tokens of one expert, D hidden, F width of an MLP, K experts per token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import compress

import torch
from torch import Tensor
from torch.nn.functional import silu

from runner import kernels
from runner.budget import BLOCK_TOKENS
from runner.config import ModelConfig
from runner.fp8 import Mlp, linear, round_activation
from runner.kernels import Part
from runner.parameters import Parameters
from runner.router import Router, Routing

Observer = Callable[[int, Tensor], None]
"""Called as observer(layer, expert_ids) once per MoE layer and pass, before the experts run."""


Chosen = dict[int, tuple[Tensor, Tensor]]
"""By expert: its tokens, [t] int64 ascending, and their weights, [t] float32."""

Groups = Iterator[Iterator[list[tuple[int, Mlp]]]]


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


def _mlps(experts: Sequence[tuple[Mlp, Tensor | None]], x_TD: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Give what each MLP makes of its rows of x, which is rounded already."""
    compiled = kernels.active()
    if compiled is None:
        return [_mlp(mlp, x_TD, token, dtype) for mlp, token in experts]
    # Each by its own encodings alone: which experts are beside it depends on what was in memory.
    is_fast = [all(map(kernels.multiplies, (mlp.gate, mlp.up, mlp.down))) for mlp, _ in experts]
    fast = iter(compiled.experts(list(compress(experts, is_fast)), x_TD, dtype=dtype))
    return [
        next(fast) if is_one else _mlp(mlp, x_TD, token, dtype)
        for (mlp, token), is_one in zip(experts, is_fast, strict=True)
    ]


def _mlp(mlp: Mlp, x_TD: Tensor, token: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same for one, product by product."""
    x = x_TD if token is None else x_TD[token]
    return linear(silu(linear(x, mlp.gate)).mul_(linear(x, mlp.up)), mlp.down, dtype=dtype)


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
        self._shared_experts: list[Mlp] | None = None

    def __call__(self, x_TD: Tensor, observer: Observer | None = None) -> Tensor:
        """Give the weighted sum of the chosen experts, by ascending id, plus the shared; [T, D] float32."""
        routing = self._router(x_TD)
        if observer is not None:
            observer(self._layer, routing.expert_ids)
        chosen = {expert: (token, weight) for expert, token, weight in _by_expert(routing)}
        x_TD = round_activation(x_TD, self._dtype)
        out_TD = torch.zeros_like(x_TD)
        with closing(self._parameters.experts(self._layer, list(chosen), self._width, x_TD.shape[1])) as groups:
            if len(x_TD) <= BLOCK_TOKENS:
                self._add_few(x_TD, chosen, groups, out_TD)
            else:
                self._add_many(x_TD, chosen, groups, out_TD)
        return out_TD

    def _add_few(self, x_TD: Tensor, chosen: Chosen, groups: Groups, out_TD: Tensor) -> None:
        """Each expert is computed when it is there, in whatever order; the sum keeps its own."""
        shared = self._shared(x_TD.shape[1])
        shared_TD: list[Tensor] = []
        for group in groups:
            found: dict[int, Tensor] = {}
            for some in group:
                # The shared experts first, while the others are on their way.
                now = [*((mlp, None) for mlp in shared), *((mlp, chosen[expert][0]) for expert, mlp in some)]
                outputs = _mlps(now, x_TD, self._dtype)
                shared_TD += outputs[: len(shared)]
                found.update(zip((expert for expert, _ in some), outputs[len(shared) :], strict=True))
                shared = []
            in_order = [(found[expert], *chosen[expert]) for expert in sorted(found)]
            _add([Part(y=y, token=token, weight=weight) for y, token, weight in in_order], out_TD)
        _add([Part(y=y) for y in shared_TD], out_TD)

    def _add_many(self, x_TD: Tensor, chosen: Chosen, groups: Groups, out_TD: Tensor) -> None:
        """A block of tokens at a time: all outputs of a group at once might be many times the input."""
        for group in groups:
            mlps = sorted((held for some in group for held in some), key=lambda held: held[0])
            for begin in range(0, len(x_TD), BLOCK_TOKENS):
                block = slice(begin, begin + BLOCK_TOKENS)
                parts = [_of_block(*chosen[expert], begin) for expert, _ in mlps]
                work = [(mlp, token) for (_, mlp), (token, _) in zip(mlps, parts, strict=True)]
                outputs = _mlps(work, x_TD[block], self._dtype)
                _add(
                    [Part(y=y, token=token, weight=weight) for y, (token, weight) in zip(outputs, parts, strict=True)],
                    out_TD[block],
                )
        shared = [(mlp, None) for mlp in self._shared(x_TD.shape[1])]
        for x_tD, out_tD in zip(x_TD.split(BLOCK_TOKENS), out_TD.split(BLOCK_TOKENS), strict=True):
            _add([Part(y=y) for y in _mlps(shared, x_tD, self._dtype)], out_tD)

    def _shared(self, hidden: int) -> list[Mlp]:
        if self._shared_experts is None:
            prefix = f"{self._prefix}.shared_experts"
            has_some = self._shared_width > 0
            self._shared_experts = [self._parameters.mlp(prefix, self._shared_width, hidden)] if has_some else []
        return self._shared_experts


def _of_block(token: Tensor, weight: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """The tokens of one block, counted from its first, and their weights; tokens ascend."""
    some = slice(*torch.searchsorted(token, torch.tensor([begin, begin + BLOCK_TOKENS])).tolist())
    return token[some] - begin, weight[some]


def _add(parts: list[Part], out_TD: Tensor) -> None:
    """Add parts to a sum, in their order."""
    if (compiled := kernels.active()) is not None:
        if parts:
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
    if len(routing.expert_ids) == 1:  # what follows takes a while, and a token's experts ascend
        token = torch.zeros(1, dtype=torch.int64)
        for expert, weight in zip(routing.expert_ids[0].tolist(), routing.weights[0].split(1), strict=True):
            yield expert, token, weight
        return
    # Stable, so that an expert's tokens keep their order.
    flat = routing.expert_ids.flatten()
    order = flat.argsort(stable=True)
    experts, counts = flat[order].unique_consecutive(return_counts=True)
    tokens, weights = order // routing.expert_ids.shape[1], routing.weights.flatten()[order]
    sizes = counts.tolist()
    yield from zip(experts.tolist(), tokens.split(sizes), weights.split(sizes), strict=True)
