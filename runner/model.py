"""The decoder: token ids in, hidden states and logits out. It knows tensors and names, never paths or text.

Weights are fetched at the moment of use, so building a model touches none. The residual stream and all norms
are float32. The MTP layer behind them is in mtp.py.

Shapes: T tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor

from manifests.errors import ToolkitError
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.expected import EMBEDDING, head_of
from runner.fp8 import linear
from runner.layer import DecoderLayer
from runner.moe import Observer
from runner.norm import rms_norm
from runner.parameters import Parameters, Weights
from runner.rope import Rope


class Model:
    """A DeepSeek-V2 or V3 style decoder over a store of weights.

    Args:
        config: What the checkpoint is.
        weights: Where its tensors are.
        dtype: float32, or bfloat16 to round what enters each product with a weight; products, norms, router,
            attention scores and the residual stream are float32 either way.

    Attributes:
        config: As given.
        dtype: As given.
        observer: Told which experts each MoE layer chose; None for nobody.
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ToolkitError(f"the runner computes in float32 or bfloat16, not {dtype}")
        self.config = config
        self.observer: Observer | None = None
        self.dtype = dtype
        self._parameters = Parameters(weights, config.weight_block_size)
        self._rope = Rope(config)
        self._layers = [
            DecoderLayer(config, self._parameters, layer, dtype=dtype) for layer in range(config.num_hidden_layers)
        ]

    def hidden(self, ids: Tensor, cache: LatentCache) -> Tensor:
        """Run T new tokens after those in the cache, and give what the head takes: [T, D] float32.

        Raises:
            See `stream`.
        """
        return self.norm(self.stream(ids, cache))

    def stream(self, ids: Tensor, cache: LatentCache) -> Tensor:
        """Run T new tokens after those in the cache, which then holds them too.

        Args:
            ids: [T] int64.
            cache: Of this model's config.

        Returns:
            [T, D] float32, the residual stream behind the last layer.

        Raises:
            ResourceError: The cache has no room for them; it is unchanged.
            ToolkitError: An id is not in the vocabulary.
        """
        config, count = self.config, ids.shape[0]
        outside = ids[(ids < 0) | (ids >= config.vocab_size)]
        if len(outside):
            raise ToolkitError(f"token id {int(outside[0])} is outside the vocabulary of {config.vocab_size}")
        cache.check_room(count)
        self._parameters.begin_pass()
        x_TD = self._parameters.rows(f"{EMBEDDING}.weight", ids, config.vocab_size, config.hidden_size)
        rotation = self._rope.rotation(cache.length, count)
        for layer in self._layers:
            layer(x_TD, cache, rotation, self.observer)
        cache.advance(count)
        return x_TD

    def norm(self, stream: Tensor) -> Tensor:
        """Apply the final norm, [T, D] to [T, D]."""
        weight = self._parameters.vector("model.norm.weight", self.config.hidden_size)
        return rms_norm(stream, weight, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head: [T, D] float32 to [T, V] float32."""
        head = self._parameters.matrix(head_of(self.config), self.config.vocab_size, self.config.hidden_size)
        return linear(hidden, head, dtype=self.dtype)
