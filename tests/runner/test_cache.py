"""The latent cache: growth, truncation, the end of the context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from manifests.errors import ResourceError
from runner.cache import LatentCache
from runner.config import ModelConfig


@pytest.fixture
def config(tiny_configs: dict[str, dict[str, Any]]) -> ModelConfig:
    return ModelConfig.from_dict(tiny_configs["v3"])


def rows(config: ModelConfig, *values: float) -> tuple[Tensor, Tensor]:
    """Positions that can be told apart: every number of one is its value."""
    column = torch.tensor(values).unsqueeze(1)
    return column.expand(-1, config.kv_lora_rank), -column.expand(-1, config.qk_rope_head_dim)


def append(cache: LatentCache, config: ModelConfig, *values: float) -> list[float]:
    """Write every layer, count the positions, and give the last layer's values."""
    for layer in range(config.num_hidden_layers):
        c, k_pe = cache.write(layer, *rows(config, *values))
    cache.advance(len(values))
    assert torch.equal(c[:, 0], -k_pe[:, 0])
    return c[:, 0].tolist()


def test_positions_line_up_through_growth(config: ModelConfig) -> None:
    cache = LatentCache(config, 2000)
    expected: list[float] = []
    for size in (1, 300, 1, 700, 998):
        new = [float(len(expected) + i) for i in range(size)]
        expected += new
        assert append(cache, config, *new) == expected
    assert cache.length == 2000


def test_memory_follows_the_text_and_not_the_context(config: ModelConfig) -> None:
    cache = LatentCache(config, 1_000_000_000)
    append(cache, config, 1.0)
    c, _ = cache.write(0, *rows(config, 2.0))
    assert c.untyped_storage().nbytes() < 1_000_000


def test_truncated_positions_are_written_over(config: ModelConfig) -> None:
    cache = LatentCache(config, 100)
    append(cache, config, 1.0, 2.0, 3.0, 4.0)
    cache.truncate(2)
    assert cache.length == 2
    assert append(cache, config, 9.0) == [1.0, 2.0, 9.0]
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(4)


def test_a_pass_that_fails_midway_leaves_no_trace(config: ModelConfig) -> None:
    cache = LatentCache(config, 100)
    append(cache, config, 1.0)
    cache.write(0, *rows(config, 7.0))  # the other layers never got there
    assert cache.length == 1
    assert append(cache, config, 2.0) == [1.0, 2.0]


def test_a_full_context_says_so(config: ModelConfig) -> None:
    cache = LatentCache(config, 3)
    append(cache, config, 1.0, 2.0, 3.0)
    for overflow in (lambda: cache.check_room(1), lambda: cache.write(0, *rows(config, 4.0))):
        with pytest.raises(ResourceError, match=r"needs 4 positions.*holds 3.*--ctx") as caught:
            overflow()
        assert caught.value.exit_code == 15
    assert cache.length == 3
