"""The multi-token-prediction (MTP) layer: from a token's hidden state and the next token, the one after that.

    h' = eh_proj(concat[enorm(embed(t[i+1])), hnorm(h[i])])     the embedding comes first
    h'' = decoder layer ``num_hidden_layers`` of h', with its own latent cache
    logits of t[i+2] = shared_head.head(shared_head.norm(h''))

The order is that of vLLM, SGLang, TensorRT-LLM and transformers; equation 21 of the paper has it the other way round.
An entry of the cache belongs to position i. Positions are relative in RoPE, so i + 1 would do as well.

Shapes: T entries, t of one block, D hidden, V vocabulary.

Source: DeepSeek-V3 README_WEIGHTS; arXiv 2412.19437, section 2.2.
"""

import torch
from torch import Tensor

from runner.budget import BLOCK_TOKENS
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.fp8 import linear
from runner.layer import DecoderLayer
from runner.moe import Observer
from runner.norm import rms_norm
from runner.parameters import Parameters, Weights
from runner.rope import Rope


class MtpModule:
    """The MTP layer of a checkpoint, over a store of weights.

    Args:
        config: What the checkpoint is.
        weights: Where its tensors are.
        embedding: Name of the embedding, ``model.embed_tokens`` or a copy of it.
        head: Name of the head, ``lm_head`` or a copy of it.
        dtype: As for the model.

    Attributes:
        layer: Its number.
        observer: Told which experts the layer chose; None for nobody.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        embedding: str = "model.embed_tokens",
        head: str = "lm_head",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layer = config.num_hidden_layers
        self.observer: Observer | None = None
        self._config = config
        self._parameters = Parameters(weights, config.weight_block_size)
        self._embedding = embedding
        self._head = head
        self._dtype = dtype
        self._prefix = f"model.layers.{self.layer}"
        self._rope = Rope(config)
        self._decoder = DecoderLayer(config, self._parameters, self.layer, dtype=dtype)

    def new_cache(self, ctx: int) -> LatentCache:
        """A cache for this layer alone."""
        return LatentCache(self._config, ctx, [self.layer])

    def stream(self, hidden: Tensor, ids: Tensor, cache: LatentCache) -> Tensor:
        """Run T entries after those in the cache, which then holds them too.

        Args:
            hidden: [T, D] float32, of the main model at T positions, or what this gave one position earlier.
            ids: [T] int64, the token that follows each of them.
            cache: Of this layer.

        Returns:
            [T, D] float32, the residual stream behind the layer.

        Raises:
            ResourceError: The cache has no room for them; it is unchanged.
        """
        cache.check_room(len(ids))
        x_TD = torch.empty_like(hidden)
        for begin in range(0, len(ids), BLOCK_TOKENS):
            block = slice(begin, begin + BLOCK_TOKENS)
            x_TD[block] = self._join(hidden[block], ids[block])
        self._decoder(x_TD, cache, self._rope.rotation(cache.length, len(ids)), self.observer)
        cache.advance(len(ids))
        return x_TD

    def norm(self, stream: Tensor) -> Tensor:
        """Apply the norm of the shared head, [T, D] to [T, D]."""
        return self._norm(stream, "shared_head.norm")

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head: [T, D] float32, normed, to [T, V] float32."""
        head = self._parameters.matrix(self._head, self._config.vocab_size, self._config.hidden_size)
        return linear(hidden, head, dtype=self._dtype)

    def _join(self, hidden_tD: Tensor, ids_t: Tensor) -> Tensor:
        config, width = self._config, self._config.hidden_size
        embedded_tD = self._parameters.rows(f"{self._embedding}.weight", ids_t, config.vocab_size, width)
        both = (self._norm(embedded_tD, "enorm"), self._norm(hidden_tD, "hnorm"))
        matrix = self._parameters.matrix(f"{self._prefix}.eh_proj", width, 2 * width)
        return linear(torch.cat(both, dim=-1), matrix, dtype=self._dtype)

    def _norm(self, x_TD: Tensor, name: str) -> Tensor:
        weight = self._parameters.vector(f"{self._prefix}.{name}.weight", self._config.hidden_size)
        return rms_norm(x_TD, weight, self._config.rms_norm_eps)
