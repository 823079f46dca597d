"""The division of memory: never more than allowed, refused below the floor, and the floor that is said is enough."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ResourceError
from runner.budget import BLOCK_TOKENS, HEAD_TOKENS, PASS_TOKENS, Budget, Sizes, plan_budget, work_bytes
from runner.config import ModelConfig
from runner.machine import Machine

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIG = ModelConfig.from_dict(V3)
SIZES = Sizes(dense=17_300_000_000, expert=44_050_944, slot=44_059_136, experts=58 * 256, layers=61)
HERE = Machine(
    system="",
    cpu="",
    features=(),
    cores=2,
    memory_bytes=25_000_000_000,
    available_bytes=24_000_000_000,
)
PROCESS = 250_000_000


def plan(ram: int | None, ctx: int | None = None, *, here: Machine = HERE, sizes: Sizes = SIZES) -> Budget:
    return plan_budget(CONFIG, sizes, ram=ram, ctx=ctx, here=here, process=PROCESS, is_compiled=True)


def taken(budget: Budget) -> int:
    return budget.fixed + budget.slots * budget.slot


@given(
    ram=st.integers(0, 900_000_000_000),
    ctx=st.none() | st.integers(1, CONFIG.max_position_embeddings),
)
def test_nothing_goes_over_it(ram: int, ctx: int | None) -> None:
    try:
        budget = plan(ram, ctx)
    except ResourceError as error:
        floor = re.search(r"at least ([0-9.]+) GB", str(error))
        assert floor is not None
        assert ram < float(floor[1]) * 1e9
        return
    assert taken(budget) <= ram
    assert CONFIG.num_experts_per_tok <= budget.slots <= SIZES.experts
    assert budget.ctx == ctx if ctx is not None else 1024 <= budget.ctx <= CONFIG.max_position_embeddings
    assert min(BLOCK_TOKENS, budget.ctx) <= budget.pass_tokens <= min(PASS_TOKENS, budget.ctx)
    assert budget.work == work_bytes(CONFIG, budget.pass_tokens, budget.ctx, is_compiled=True)
    # What is left over is less than one more expert, unless all are there.
    assert budget.slots == SIZES.experts or ram - taken(budget) < budget.slot


def test_the_floor_that_is_said_is_enough() -> None:
    with pytest.raises(ResourceError, match=r"--ram is 1\.00 GB; give more, or a smaller --ctx") as refused:
        plan(1_000_000_000)
    floor = re.search(r"at least ([0-9.]+) GB", str(refused.value))
    assert floor is not None
    budget = plan(int(float(floor[1]) * 1e9))
    assert budget.slots <= CONFIG.num_experts_per_tok + 2
    assert budget.ctx <= 1200
    for part in ("dense weights 17.3 GB", "8 experts 352 MB", "a context of 1024 tokens", "activations", "the process"):
        assert part in str(refused.value)


def test_the_logits_of_a_large_vocabulary_count() -> None:
    """A pass of a narrow model takes less than its head: two blocks of logits, or one and what is made of it."""
    narrow = replace(CONFIG, hidden_size=256, intermediate_size=96, moe_intermediate_size=40, num_attention_heads=2)
    logits = min(600, HEAD_TOKENS) * CONFIG.vocab_size * 4
    assert work_bytes(narrow, 600, 600, is_compiled=True) >= 2 * logits
    assert work_bytes(CONFIG, 512, 1024, is_compiled=True) == work_bytes(
        replace(CONFIG, vocab_size=1), 512, 1024, is_compiled=True
    )


def test_a_longer_text_costs_experts_and_is_refused_when_it_does_not_fit() -> None:
    short, long = plan(24_000_000_000, 2000), plan(24_000_000_000, 16_000)
    assert long.cache - short.cache == 14_000 * 61 * 576 * 4
    assert long.slots < short.slots
    with pytest.raises(ResourceError, match=r"a context of 163840 tokens 23\.0 GB"):
        plan(24_000_000_000, 163_840)


def test_more_memory_makes_longer_passes_and_contexts() -> None:
    small, large = plan(18_600_000_000), plan(200_000_000_000)
    assert (small.pass_tokens, large.pass_tokens) == (BLOCK_TOKENS, PASS_TOKENS)
    assert small.ctx < large.ctx
    assert small.slots < large.slots


def test_the_machine_is_the_bound_when_nothing_is_said() -> None:
    budget = plan(None)
    assert budget.ram == 24_000_000_000 + PROCESS - 2**30
    assert taken(budget) <= budget.ram
    with pytest.raises(ResourceError, match=r"this machine has 2\.05 GB; free some memory"):
        plan(None, here=replace(HERE, available_bytes=2_000_000_000, memory_bytes=2_000_000_000))


def test_a_system_that_does_not_tell_bounds_nothing() -> None:
    budget = plan(None, here=replace(HERE, available_bytes=None, memory_bytes=None))
    assert (budget.ram, budget.slots, budget.ctx) == (None, SIZES.experts, CONFIG.max_position_embeddings)


def test_a_model_that_fits_is_all_in_memory() -> None:
    budget = plan(20_000_000_000, sizes=Sizes(dense=100_000_000, expert=90_000, slot=98_304, experts=192, layers=4))
    assert budget.slots == 192
