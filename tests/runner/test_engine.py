"""Generation: the cache is an accelerator and never an influence."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from manifests.errors import ResourceError, ToolkitError
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.engine import Engine
from runner.model import Model
from runner.sampling import SamplingParams, sample

GREEDY = SamplingParams()
RANDOM = SamplingParams(temperature=1.5, top_k=40, seed=8)


class CountingModel(Model):
    """A model that notes how many tokens each pass ran."""

    def __init__(self, config: ModelConfig, weights: Any) -> None:
        super().__init__(config, weights)
        self.passes: list[int] = []

    def stream(self, ids: Tensor, cache: LatentCache) -> Tensor:
        self.passes.append(len(ids))
        return super().stream(ids, cache)


@pytest.fixture
def model(
    reference: SimpleNamespace,
    tiny_configs: dict[str, dict[str, Any]],
    tiny_weights: Callable[[str], dict[str, Tensor]],
) -> CountingModel:
    config = ModelConfig.from_dict(tiny_configs["v2_lite"])
    return CountingModel(config, reference.tiny.DictStore(tiny_weights("v2_lite")))


def prompt(count: int, seed: int = 1) -> list[int]:
    return torch.randint(2, 288, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def fresh(
    model: Model, ids: list[int], count: int, sampling: SamplingParams = GREEDY, *, pass_tokens: int = 512
) -> list[int]:
    engine = Engine(model, ctx=200, pass_tokens=pass_tokens)
    return list(engine.generate(ids, max_tokens=count, sampling=sampling, eos_ids=()))


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
def test_generation_equals_running_the_whole_text_each_time(model: CountingModel, sampling: SamplingParams) -> None:
    ids = prompt(9)
    timeline = list(ids)
    for _ in range(12):
        logits = model.logits(model.hidden(torch.tensor(timeline), LatentCache(model.config, 50)))[-1]
        timeline.append(sample(logits, sampling, len(timeline)))
    assert len(set(timeline[9:])) > 4  # a loop of one token would prove little
    assert fresh(model, ids, 12, sampling) == timeline[9:]


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
def test_a_reused_prefix_gives_the_same_tokens(model: CountingModel, sampling: SamplingParams) -> None:
    """Every way in which a new text can relate to the held one."""
    engine, base = Engine(model, ctx=200), prompt(30)
    texts = [
        base,
        base,  # the same again: all held but the last token's hidden state
        base[:17],  # shorter
        base[:17] + prompt(8, 2),  # a branch
        base + prompt(5, 3),  # longer
        prompt(6, 4),  # another text
        base[:1],
        prompt(40, 5),
    ]
    for text in texts:
        ours = list(engine.generate(text, max_tokens=6, sampling=sampling, eos_ids=()))
        assert ours == fresh(model, text, 6, sampling)


def test_a_chat_runs_only_what_is_new(model: CountingModel) -> None:
    engine, ids = Engine(model, ctx=200), prompt(30)
    answer = list(engine.generate(ids, max_tokens=4, sampling=GREEDY, eos_ids=()))
    assert model.passes == [30, 1, 1, 1]
    model.passes.clear()
    # The last answer token was never run; it and the next turn are.
    list(engine.generate(ids + answer + prompt(5, 2), max_tokens=1, sampling=GREEDY, eos_ids=()))
    assert model.passes == [6]
    model.passes.clear()
    list(engine.generate(ids, max_tokens=1, sampling=GREEDY, eos_ids=()))
    assert model.passes == [1]


def test_prefill_runs_in_chunks_and_the_head_on_one_row(model: CountingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fresh(model, prompt(50), 5)
    model.passes.clear()
    rows: list[int] = []
    head = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(len(hidden)), head(hidden))[1])
    assert fresh(model, prompt(50), 5, pass_tokens=16) == whole
    assert model.passes == [16, 16, 16, 2, 1, 1, 1, 1]
    assert rows == [1] * 5


def test_logits_of_every_position(model: CountingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(50)
    expected = model.logits(model.hidden(torch.tensor(ids), LatentCache(model.config, 50)))
    engine = Engine(model, ctx=60)
    list(engine.generate(ids[:20], max_tokens=3, sampling=GREEDY, eos_ids=()))  # must not matter
    torch.testing.assert_close(engine.logits(ids), expected, rtol=0, atol=1e-4)
    rows: list[int] = []
    head = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(len(hidden)), head(hidden))[1])
    engine = Engine(model, ctx=60, pass_tokens=16)
    torch.testing.assert_close(engine.logits(ids), expected, rtol=0, atol=1e-4)
    assert rows == [16, 16, 16, 2]
    after = list(engine.generate(ids, max_tokens=3, sampling=GREEDY, eos_ids=()))
    assert after == fresh(model, ids, 3)


def test_eos_ends_the_text_and_is_not_given(model: CountingModel) -> None:
    tokens = fresh(model, prompt(9), 12)
    eos = tokens[5]
    engine = Engine(model, ctx=200)
    assert (
        list(engine.generate(prompt(9), max_tokens=12, sampling=GREEDY, eos_ids=[eos])) == tokens[: tokens.index(eos)]
    )


def test_two_texts_in_turn_do_not_disturb_each_other(model: CountingModel) -> None:
    engine = Engine(model, ctx=200)
    left = engine.generate(prompt(9, 1), max_tokens=6, sampling=GREEDY, eos_ids=())
    right = engine.generate(prompt(12, 2), max_tokens=6, sampling=GREEDY, eos_ids=())
    pairs = list(zip(left, right, strict=True))
    assert [pair[0] for pair in pairs] == fresh(model, prompt(9, 1), 6)
    assert [pair[1] for pair in pairs] == fresh(model, prompt(12, 2), 6)


def test_a_text_left_halfway_leaves_the_engine_usable(model: CountingModel) -> None:
    engine = Engine(model, ctx=200)
    tokens = engine.generate(prompt(9), max_tokens=6, sampling=GREEDY, eos_ids=())
    next(tokens)
    next(tokens)
    del tokens
    assert list(engine.generate(prompt(9), max_tokens=6, sampling=GREEDY, eos_ids=())) == fresh(model, prompt(9), 6)


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs(model: CountingModel) -> None:
    engine = Engine(model, ctx=8)
    for ask in (
        lambda: engine.generate(prompt(9), max_tokens=1, sampling=GREEDY, eos_ids=()),
        lambda: engine.logits(prompt(9)),
    ):
        with pytest.raises(ResourceError, match=r"9 tokens.*holds 8.*--ctx"):
            ask()
    assert model.passes == []


def test_a_context_that_fills_up_gives_what_fits_and_then_says_so(model: CountingModel) -> None:
    engine = Engine(model, ctx=10)
    tokens = engine.generate(prompt(7), max_tokens=20, sampling=GREEDY, eos_ids=())
    given = [next(tokens) for _ in range(4)]
    with pytest.raises(ResourceError, match=r"11 positions.*holds 10"):
        next(tokens)
    # Three positions after the prompt, and one more token that needs no position of its own.
    assert given == fresh(model, prompt(7), 4)
    assert list(engine.generate(prompt(7), max_tokens=4, sampling=GREEDY, eos_ids=())) == given


@pytest.mark.parametrize("ctx", [0, -5, 4097])
def test_a_context_that_the_model_was_not_made_for_is_refused(model: CountingModel, ctx: int) -> None:
    with pytest.raises(ResourceError, match="1 to 4096"):
        Engine(model, ctx=ctx)


def test_no_tokens_no_new_tokens_and_wrong_tokens(model: CountingModel) -> None:
    engine = Engine(model, ctx=20)
    for ids, named in (([], "no tokens"), ([3, 288], "id 288"), ([-1], "id -1")):
        with pytest.raises(ToolkitError, match=named):
            engine.generate(ids, max_tokens=1, sampling=GREEDY, eos_ids=())
    assert list(engine.generate([3], max_tokens=0, sampling=GREEDY, eos_ids=())) == []
    assert model.passes == []
