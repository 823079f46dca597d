"""Perplexity and bits per byte: every token after the first exactly once, whatever the window."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import runner.evaluate
from manifests.errors import ToolkitError
from runner.budget import HEAD_TOKENS
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.evaluate import Evaluation, evaluate, total
from runner.loaded import LoadedModel

VOCAB = 7


class Bigrams:
    """A model that looks at the last id only, so that a text costs the same in any windows; it remembers its input."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.read: list[list[int]] = []
        self.most_rows = 0
        self.table_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))

    def hidden(self, ids: Tensor, cache: LatentCache) -> Tensor:
        if cache.length == 0:
            self.read.append([])
        self.read[-1] += ids.tolist()
        cache.check_room(len(ids))
        cache.advance(len(ids))
        return ids

    def logits(self, hidden: Tensor) -> Tensor:
        self.most_rows = max(self.most_rows, len(hidden))
        return self.table_VV[hidden]

    def cost(self, ids: list[int]) -> float:
        log_p = self.table_VV.double().log_softmax(1)
        return -sum(float(log_p[a, b]) for a, b in itertools.pairwise(ids))


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((tiny_checkpoint / "config.json").read_text(encoding="utf-8")))


def run(model: Any, ids: list[int], *, ctx: int) -> tuple[Evaluation, list[int]]:
    reported: list[int] = []
    found = evaluate(model, ids, ctx=ctx, text_bytes=11, on_tokens=reported.append)
    return found, reported


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    ids=st.lists(st.integers(min_value=0, max_value=VOCAB - 1), min_size=2, max_size=60),
    ctx=st.integers(min_value=2, max_value=20),
    at_once=st.integers(min_value=1, max_value=8),
)
def test_every_token_after_the_first_exactly_once(config: ModelConfig, ids: list[int], ctx: int, at_once: int) -> None:
    model = Bigrams(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.evaluate, "BLOCK_TOKENS", at_once)
        patch.setattr(runner.evaluate, "_ROWS_AT_ONCE", 3)
        found, reported = run(model, ids, ctx=ctx)
    assert found.tokens == sum(reported) == len(ids) - 1
    assert found.nll == pytest.approx(model.cost(ids), rel=1e-12)
    # Windows follow each other without gap or repetition, none longer than ctx with the token it predicts last.
    assert [token for window in model.read for token in window] == ids[:-1]
    assert [len(window) + 1 for window in model.read[:-1]] == [ctx] * (len(model.read) - 1)


def test_no_more_logits_at_once_than_the_budget_has_room_for(config: ModelConfig) -> None:
    model = Bigrams(config)
    found, _ = run(model, [one % VOCAB for one in range(500)], ctx=400)
    assert model.most_rows == HEAD_TOKENS
    assert found.tokens == 499


def test_the_figures() -> None:
    found = Evaluation(tokens=4, text_bytes=8, nll=8 * math.log(2))
    assert found.bits_per_byte == pytest.approx(1.0)
    assert found.perplexity == pytest.approx(4.0)
    assert str(found) == "1.0000 bits per byte, perplexity 4.000 (4 tokens, 8 bytes, nll 5.55 nats)"
    assert found.to_document() == {
        "tokens": 4,
        "bytes": 8,
        "nll": found.nll,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
    }


def test_a_hopeless_model_still_makes_valid_json() -> None:
    found = Evaluation(tokens=1, text_bytes=1, nll=1e6)
    assert (found.perplexity, found.to_document()["perplexity"]) == (math.inf, None)


def test_texts_add_up_by_bytes() -> None:
    parts = [Evaluation(tokens=4, text_bytes=8, nll=2.0), Evaluation(tokens=1, text_bytes=100, nll=5.0)]
    assert total(parts) == Evaluation(tokens=5, text_bytes=108, nll=7.0)


@pytest.mark.parametrize(("ids", "text_bytes"), [([], 3), ([0], 3), ([0, 1], 0)])
def test_nothing_to_predict(config: ModelConfig, ids: list[int], text_bytes: int) -> None:
    with pytest.raises(ToolkitError, match="nothing to predict"):
        evaluate(Bigrams(config), ids, ctx=4, text_bytes=text_bytes)  # type: ignore[arg-type]


def test_a_whole_model(tiny_checkpoint: Path) -> None:
    loaded = LoadedModel(tiny_checkpoint)
    ids = loaded.text.encode("def hello(shell): return hell")
    log_p = loaded.logits(ids).double().log_softmax(1)
    expected = -sum(float(log_p[at, token]) for at, token in enumerate(ids[1:]))
    found = evaluate(loaded.model, ids, ctx=len(ids), text_bytes=29)
    assert found.nll == pytest.approx(expected, rel=1e-5)
    # With a shorter window the model sees less of what came before, so the cost differs.
    shorter = evaluate(loaded.model, ids, ctx=5, text_bytes=29)
    assert shorter.tokens == found.tokens
    assert abs(shorter.nll - found.nll) > 0.01
