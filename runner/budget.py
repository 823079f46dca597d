"""How much memory a run may take, and what for: what must be there, and how many experts fit beside it.

Arithmetic on sizes: nothing is read or reserved here. This file must not know tensors or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manifests.console import format_bytes
from manifests.errors import ResourceError
from runner import machine
from runner.config import ModelConfig

FLOAT_BYTES = 4
BLOCK_TOKENS = 512
"""Tokens whose activations are computed at once, within a layer."""

PASS_TOKENS = 4096
"""Most tokens that go through the layers together. A pass reads each expert once, so more of them read less."""

HEAD_TOKENS = 128
"""Tokens whose logits are made at once."""

_LEAST_POSITIONS = 1024
_OWN_BYTES = 96 << 20
"""What the process grows by beside everything counted here: libraries' buffers, threads, the manifest."""

_MARGIN_BYTES = 1 << 30

_ATTENTION_BYTES = 64 << 20
"""What attention works in beside a block's queries: its own bound (see attention.py), and that of attention.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a checkpoint, in bytes.

    Attributes:
        dense: All that is not a routed expert, as it lies in memory.
        expert: One routed expert.
        slot: What one takes of the window.
        experts: Routed experts there are.
        layers: Layers with a cache.
    """

    dense: int
    expert: int
    slot: int
    experts: int
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the memory is for, in bytes where nothing else is said.

    Attributes:
        ram: All of it; None when nothing bounds it.
        process: Python and its libraries.
        dense: Dense weights.
        cache: The latent KV cache of ``ctx`` positions.
        work: Activations and buffers of a pass of ``pass_tokens``.
        expert: One expert.
        slot: What one takes of the window.
        slots: Experts that may be in memory at once.
        ctx: Positions of the text.
        pass_tokens: Most tokens of one pass.
    """

    ram: int | None
    process: int
    dense: int
    cache: int
    work: int
    expert: int
    slot: int
    slots: int
    ctx: int
    pass_tokens: int

    @property
    def fixed(self) -> int:
        """Everything but experts."""
        return self.process + self.dense + self.cache + self.work

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        return {
            "ram_bytes": self.ram,
            "process_bytes": self.process,
            "dense_bytes": self.dense,
            "cache_bytes": self.cache,
            "work_bytes": self.work,
            "expert_bytes": self.expert,
            "slot_bytes": self.slot,
            "expert_slots": self.slots,
            "ctx": self.ctx,
            "pass_tokens": self.pass_tokens,
        }


def plan_budget(
    config: ModelConfig,
    sizes: Sizes,
    *,
    ram: int | None,
    ctx: int | None,
    here: machine.Machine,
    process: int,
    is_compiled: bool,
) -> Budget:
    """Divide the memory.

    Args:
        config: The model.
        sizes: Its checkpoint.
        ram: Bytes that the process may take in all; what the machine has to give when None.
        ctx: Positions wanted; as many as fit in an eighth of what is free, up to the model's limit, when None.
        here: The machine.
        process: Bytes that the process takes already.
        is_compiled: Whether the compiled library is there.

    Raises:
        ResourceError: It is less than the least that this model needs.
    """
    bound = _available(here, process) if ram is None else ram
    least = _Least(config, sizes, process + _OWN_BYTES, is_compiled=is_compiled)
    limit = config.max_position_embeddings
    positions = min(limit, _LEAST_POSITIONS) if ctx is None else ctx
    tokens = min(BLOCK_TOKENS, positions)
    if bound is None:
        positions, tokens = limit if ctx is None else ctx, min(PASS_TOKENS, limit)
        return least.budget(None, positions, tokens, sizes.experts)
    free = bound - least.total(positions, tokens)
    if free < 0:
        given = "this machine has" if ram is None else "--ram is"
        more = "free some memory" if ram is None else "give more"
        raise ResourceError(
            f"this model needs at least {least.describe(positions, tokens)}, but {given} {format_bytes(bound)}; "
            f"{more}, or a smaller --ctx"
        )
    if ctx is None:
        positions = min(limit, positions + free // 8 // least.position)
    # A long pass pays when experts come from the disk; an eighth of what is free is not missed by them.
    while tokens < min(PASS_TOKENS, positions):
        more_tokens = min(2 * tokens, PASS_TOKENS, positions)
        extra = least.total(positions, more_tokens) - least.total(positions, min(BLOCK_TOKENS, positions))
        if bound - least.total(positions, more_tokens) < 7 * extra:
            break
        tokens = more_tokens
    spare = (bound - least.total(positions, tokens)) // max(1, sizes.slot)
    return least.budget(bound, positions, tokens, min(sizes.experts, least.experts + spare))


class _Least:
    """What a model cannot do without.

    Attributes:
        experts: Slots that a token needs.
        position: Bytes of one position of the cache.
    """

    def __init__(self, config: ModelConfig, sizes: Sizes, process: int, *, is_compiled: bool) -> None:
        self.experts = min(config.num_experts_per_tok, sizes.experts)
        self.position = sizes.layers * (config.kv_lora_rank + config.qk_rope_head_dim) * FLOAT_BYTES
        self._config = config
        self._sizes = sizes
        self._process = process
        self._is_compiled = is_compiled

    def budget(self, ram: int | None, positions: int, tokens: int, slots: int) -> Budget:
        """With so many positions, tokens of a pass, and experts."""
        return Budget(
            ram=ram,
            process=self._process,
            dense=self._sizes.dense,
            cache=positions * self.position,
            work=work_bytes(
                self._config,
                tokens,
                positions,
                is_compiled=self._is_compiled,
                has_mtp=self._sizes.layers > self._config.num_hidden_layers,
            ),
            expert=self._sizes.expert,
            slot=self._sizes.slot,
            slots=max(1, slots),
            ctx=positions,
            pass_tokens=tokens,
        )

    def total(self, positions: int, tokens: int) -> int:
        """Bytes with so many positions and tokens of a pass."""
        return self.budget(None, positions, tokens, 0).fixed + self.experts * self._sizes.slot

    def describe(self, positions: int, tokens: int) -> str:
        """The same in words."""
        budget = self.budget(None, positions, tokens, 0)
        parts = {
            "dense weights": budget.dense,
            f"{self.experts} experts": self.experts * budget.slot,
            f"a context of {positions} tokens": budget.cache,
            "activations": budget.work,
            "the process itself": budget.process,
        }
        total = self.total(positions, tokens)
        digit = 10 ** max(0, len(str(total)) - 3)  # three are shown: rounded up, so that what is said is enough
        what = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        return f"{format_bytes(-(-total // digit) * digit)} of memory ({what})"


def work_bytes(config: ModelConfig, tokens: int, positions: int, *, is_compiled: bool, has_mtp: bool = False) -> int:
    """Most bytes of activations and buffers in a pass.

    Of all its tokens: the residual stream, its normed form, the sum of experts and what is added to it. Of a block of
    them, one after the other: queries and outputs of attention per head, or the rows of MLPs, where in the worst case
    all tokens choose the same experts. Then the logits of some, twice: those before, or what is made of them.

    Args:
        config: The model.
        tokens: Of the pass.
        positions: Of the text, these included.
        is_compiled: Whether the compiled library is there; torch alone makes scores of a block whole.
        has_mtp: Whether the MTP layer goes over the hidden states of the pass when the model has left them.
    """
    block = min(tokens, BLOCK_TOKENS)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = block * (heads * head + (config.q_lora_rank or 0) + hidden) * FLOAT_BYTES + _ATTENTION_BYTES
    if not is_compiled:
        latents = block * heads * 2 * config.kv_lora_rank * FLOAT_BYTES
        attention += latents + 3 * max(_ATTENTION_BYTES, block * positions * FLOAT_BYTES) + _ATTENTION_BYTES
    shared = config.n_shared_experts * config.moe_intermediate_size
    routed = config.num_experts_per_tok * (2 * config.moe_intermediate_size + 2 * hidden) + 2 * shared + 2 * hidden
    mlp = block * max(2 * config.intermediate_size + 2 * hidden, routed) * FLOAT_BYTES
    head = 2 * min(tokens, HEAD_TOKENS) * config.vocab_size * FLOAT_BYTES
    return (7 if has_mtp else 5) * tokens * hidden * FLOAT_BYTES + max(attention, mlp, head)


def _available(here: machine.Machine, process: int) -> int | None:
    if here.available_bytes is None:
        return None
    margin = min(_MARGIN_BYTES, (here.memory_bytes or here.available_bytes) // 10)
    return process + max(0, here.available_bytes - margin)
