"""One decoder layer: attention, then an MLP or a mixture of experts, each added to the residual stream.

Shapes: T tokens, t of one block, D hidden.
"""

import torch
from torch import Tensor

from runner.attention import Attention
from runner.budget import BLOCK_TOKENS
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.moe import MoE, Observer, swiglu
from runner.norm import rms_norm
from runner.parameters import Parameters
from runner.rope import Rotation


class DecoderLayer:
    """Attention, then a dense MLP (the first layers) or a mixture of experts, each on the normed residual."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int, *, dtype: torch.dtype) -> None:
        self._config = config
        self._parameters = parameters
        self._prefix = f"model.layers.{layer}"
        self._dtype = dtype
        self._attention = Attention(config, parameters, layer, dtype=dtype)
        self._norms: dict[str, Tensor] = {}
        dense = layer < config.first_k_dense_replace
        self._moe = None if dense else MoE(config, parameters, layer, dtype=dtype)

    def __call__(self, x_TD: Tensor, cache: LatentCache, rotation: Rotation, observer: Observer | None) -> None:
        """Add to the residual stream, in place: a block of tokens at a time, but all of them to each expert."""
        blocks = [slice(begin, begin + BLOCK_TOKENS) for begin in range(0, len(x_TD), BLOCK_TOKENS)]
        for block in blocks:
            normed_tD = self._norm(x_TD[block], "input_layernorm")
            x_TD[block] += self._attention(normed_tD, cache, rotation[block], block.start)
        if self._moe is not None:
            x_TD += self._moe(self._norm(x_TD, "post_attention_layernorm"), observer)
            return
        width = self._config.intermediate_size
        for block in blocks:
            normed_tD = self._norm(x_TD[block], "post_attention_layernorm")
            x_TD[block] += swiglu(normed_tD, self._parameters, f"{self._prefix}.mlp", width, dtype=self._dtype)

    def _norm(self, x_TD: Tensor, name: str) -> Tensor:
        weight = self._norms.get(name)
        if weight is None:
            weight = self._parameters.vector(f"{self._prefix}.{name}.weight", self._config.hidden_size)
            self._norms[name] = weight
        return rms_norm(x_TD, weight, self._config.rms_norm_eps)
