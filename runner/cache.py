"""The latent KV cache: what attention keeps of every earlier token. Token positions and layers; no weights.

One token of one layer is ``kv_lora_rank`` normalised latents plus ``qk_rope_head_dim`` rotated key numbers
shared by all heads: 576 numbers for DeepSeek-V3, where plain keys and values would be 40,960.

Shapes: T new tokens, S tokens in the cache, C latent (kv_lora_rank), R rotary part (qk_rope_head_dim).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manifests.errors import ResourceError
from runner.config import ModelConfig

_FIRST_POSITIONS = 256


class LatentCache:
    """Latents and rotary keys of one text, float32, for some layers.

    Memory grows by doubling as the text does, up to ``ctx`` positions.

    Args:
        config: The model.
        ctx: The most positions it may hold.
        layers: Which ones; those of the main model when not given.

    Attributes:
        ctx: As given.
        length: Positions held by every layer.
    """

    def __init__(self, config: ModelConfig, ctx: int, layers: Sequence[int] | None = None) -> None:
        self.ctx = ctx
        self.length = 0
        layers = range(config.num_hidden_layers) if layers is None else layers
        self._c = {layer: torch.empty(0, config.kv_lora_rank) for layer in layers}
        self._k_pe = {layer: torch.empty(0, config.qk_rope_head_dim) for layer in layers}

    def check_room(self, count: int) -> None:
        """Refuse to take more positions than there are.

        Raises:
            ResourceError: ``count`` more positions do not fit.
        """
        if self.length + count > self.ctx:
            raise ResourceError(
                f"the text needs {self.length + count} positions, but the context holds {self.ctx}; "
                "shorten it or give a larger --ctx"
            )

    def make_room(self, layer: int, count: int, behind: int = 0) -> tuple[Tensor, Tensor]:
        """Give one layer's positions, ``count`` new ones last and yet to be written; ``advance`` makes them count.

        Args:
            layer: Which one.
            count: T, new positions.
            behind: New positions of this layer that were written before these in the same pass.

        Returns:
            c [S, C] and k_pe [S, R], contiguous float32 views, S = length + behind + T.

        Raises:
            ResourceError: They do not fit.
        """
        self.check_room(behind + count)
        begin = self.length + behind
        end = begin + count
        for rows in (self._c, self._k_pe):
            if rows[layer].shape[0] < end:
                rows[layer] = self._grown(rows[layer], begin, end)
        return self._c[layer][:end], self._k_pe[layer][:end]

    def write(self, layer: int, c_TC: Tensor, k_pe_TR: Tensor, behind: int = 0) -> tuple[Tensor, Tensor]:
        """Put T new positions of one layer behind those it holds; see ``make_room``."""
        c_SC, k_pe_SR = self.make_room(layer, c_TC.shape[0], behind)
        c_SC[self.length + behind :] = c_TC
        k_pe_SR[self.length + behind :] = k_pe_TR
        return c_SC, k_pe_SR

    def advance(self, count: int) -> None:
        """Count the positions that every layer has written. A pass that failed midway never gets here."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on; memory is kept for the next ones."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length

    def _grown(self, rows: Tensor, held: int, needed: int) -> Tensor:
        capacity = min(self.ctx, max(needed, 2 * rows.shape[0], _FIRST_POSITIONS))
        grown = rows.new_empty(capacity, rows.shape[1])
        grown[:held] = rows[:held]
        return grown
