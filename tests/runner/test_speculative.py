"""Guesses change how fast a text comes, never which one. That guesses are made well is test_drafter's matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from manifests.errors import ResourceError
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.drafter import Drafter
from runner.engine import Engine
from runner.model import Model
from runner.mtp import MtpModule
from runner.sampling import SamplingParams
from runner.speculative import Speculation

GREEDY = SamplingParams()
RANDOM = SamplingParams(temperature=1.5, top_k=40, seed=8)
CTX = 120
PROMPT = 9


class CountingModel(Model):
    """A model that notes how many tokens each pass ran."""

    def __init__(self, config: ModelConfig, weights: Any) -> None:
        super().__init__(config, weights)
        self.passes: list[int] = []

    def stream(self, ids: Tensor, cache: LatentCache) -> Tensor:
        self.passes.append(len(ids))
        return super().stream(ids, cache)


class Knowing:
    """A drafter that knows the text to come, and is wrong on order; it is told what a real one is told."""

    def __init__(self, text: Sequence[int], is_wrong: Callable[[int], bool] = lambda _position: False) -> None:
        self.length = 0
        self.waiting = 0
        self.rows: list[Tensor] = []
        self._text = text
        self._is_wrong = is_wrong

    def observe(self, position: int, stream: Tensor, normed: Tensor) -> None:
        assert position == self.length
        assert stream.shape == normed.shape
        self.rows += list(normed)
        self.length += len(normed)

    def rewind(self, length: int) -> int:
        del self.rows[length:]
        self.length = min(self.length, length)
        return length

    def enter(self, ids: Sequence[int]) -> None:
        pass

    def propose(self, ids: Sequence[int], count: int, _sampling: SamplingParams) -> list[int]:
        if len(ids) != self.length + 1:
            return []
        begin = len(ids)
        right = list(self._text[begin : begin + count])
        right += [2] * (count - len(right))
        return [(one + 1) % 288 if self._is_wrong(begin + i) else one for i, one in enumerate(right)]


class Turns:
    """A pace that guesses by a fixed pattern, and keeps what it is told."""

    def __init__(self, pattern: Callable[[int], bool] = lambda _turn: True, *, is_always: bool = False) -> None:
        self.is_always = is_always
        self.told: list[dict[str, Any]] = []
        self._pattern = pattern
        self._asked = -1  # a prompt has no guesses, so it is turn 0

    @property
    def planned(self) -> int:
        self._asked += 1
        return 99 if self._pattern(self._asked) else 0

    def record(self, seconds: float, **told: Any) -> None:
        self.told.append(told | {"seconds": seconds})


@pytest.fixture
def model(
    reference: SimpleNamespace,
    tiny_configs: dict[str, dict[str, Any]],
    tiny_weights: Callable[[str], dict[str, Tensor]],
) -> CountingModel:
    config = ModelConfig.from_dict(tiny_configs["kimi"])
    return CountingModel(config, reference.tiny.DictStore(tiny_weights("kimi")))


def prompt(count: int = PROMPT, seed: int = 1) -> list[int]:
    return torch.randint(2, 288, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain(model: Model, count: int, sampling: SamplingParams = GREEDY, ids: list[int] | None = None) -> list[int]:
    engine = Engine(model, ctx=CTX)
    return list(engine.generate(ids or prompt(), max_tokens=count, sampling=sampling, eos_ids=()))


def speculative(
    model: Model, drafter: Any, tokens: int, pace: Any = None, *, ctx: int = CTX, pass_tokens: int = 64
) -> Engine:
    speculation = Speculation(drafter, tokens, pace or Turns())
    return Engine(model, ctx=ctx, pass_tokens=pass_tokens, speculation=speculation)


def generate(engine: Engine, count: int, sampling: SamplingParams = GREEDY, eos_ids: Sequence[int] = ()) -> list[int]:
    return list(engine.generate(prompt(), max_tokens=count, sampling=sampling, eos_ids=eos_ids))


MISTAKES: dict[str, Callable[[int], bool]] = {
    "never": lambda _position: False,
    "always": lambda _position: True,
    "each-third": lambda position: position % 3 == 0,
    "first-half": lambda position: position < 25,
}


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mistakes", MISTAKES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_text_is_the_same(model: CountingModel, sampling: SamplingParams, mistakes: str, tokens: int) -> None:
    expected = plain(model, 30, sampling)
    assert len(set(expected)) > 4  # a loop of one token would prove little
    drafter = Knowing(prompt() + expected, MISTAKES[mistakes])
    assert generate(speculative(model, drafter, tokens), 30, sampling) == expected


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_right_guesses_save_passes(model: CountingModel, tokens: int) -> None:
    expected = plain(model, 1 + 6 * (tokens + 1))
    model.passes.clear()
    assert generate(speculative(model, Knowing(prompt() + expected), tokens), len(expected)) == expected
    assert model.passes == [PROMPT, *[1 + tokens] * 6]


def test_wrong_guesses_cost_rows_and_no_passes(model: CountingModel) -> None:
    expected = plain(model, 8)
    model.passes.clear()
    drafter = Knowing(prompt() + expected, MISTAKES["always"])
    assert generate(speculative(model, drafter, 2), 8) == expected
    assert model.passes == [PROMPT, 3, 3, 3, 3, 3, 2, 1]  # the last ones have no room for what nobody asked for


@pytest.mark.parametrize("pattern", [lambda turn: turn % 2 == 0, lambda turn: turn % 5 < 2, lambda turn: turn > 6])
def test_guessing_may_begin_and_pause_anywhere(model: CountingModel, pattern: Callable[[int], bool]) -> None:
    expected = plain(model, 40, RANDOM)
    pace = Turns(pattern)
    drafter = Knowing(prompt() + expected, MISTAKES["each-third"])
    assert generate(speculative(model, drafter, 3, pace), 40, RANDOM) == expected
    assert {told["guesses"] > 0 for told in pace.told} == {True, False}


def test_the_pace_is_told_what_every_pass_took_and_gave(model: CountingModel) -> None:
    expected = plain(model, 9)
    pace = Turns(lambda turn: turn > 1)
    clock, read = iter(range(100)), iter(range(0, 10_000, 100))
    speculation = Speculation(
        Knowing(prompt() + expected, lambda position: position == PROMPT + 6),
        2,
        pace,
        read_bytes=lambda: next(read),
        clock=lambda: float(next(clock)),
    )
    engine = Engine(model, ctx=CTX, speculation=speculation)
    assert generate(engine, 9) == expected
    passes = [(told["guesses"], told["right"], told["is_usual"]) for told in pace.told]
    # The prompt, a step, then guesses for places 2 to 4, 5 and wrong 6, and as many as were asked for.
    assert passes == [(0, 0, False), (0, 0, True), (2, 2, True), (2, 1, True), (1, 1, True)]
    assert {told["seconds"] for told in pace.told} == {1.0}
    assert {told["read_bytes"] for told in pace.told} == {100}


def test_the_end_of_the_text_among_guesses_ends_it(model: CountingModel) -> None:
    expected = plain(model, 12)
    for eos in expected[1:8]:
        ended = expected[: expected.index(eos)]
        engine = speculative(model, Knowing(prompt() + expected), 3)
        assert generate(engine, 12, eos_ids=[eos]) == ended
        # The cache holds more than the text now; what comes next must not see it.
        assert list(engine.generate(prompt(20, 2), max_tokens=5, sampling=GREEDY, eos_ids=())) == plain(
            model, 5, ids=prompt(20, 2)
        )


def test_a_context_is_filled_to_the_last_position(model: CountingModel) -> None:
    expected = plain(model, 12)
    engine = speculative(model, Knowing(prompt() + expected), 5, ctx=PROMPT + 7)
    tokens = engine.generate(prompt(), max_tokens=12, sampling=GREEDY, eos_ids=())
    assert [next(tokens) for _ in range(8)] == expected[:8]
    with pytest.raises(ResourceError, match="context holds 16"):
        next(tokens)


def test_guesses_fit_into_one_pass(model: CountingModel) -> None:
    expected = plain(model, 12)
    model.passes.clear()
    assert generate(speculative(model, Knowing(prompt() + expected), 5, pass_tokens=4), 12) == expected
    assert model.passes == [4, 4, 1, 4, 4, 3]


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "sampled"])
def test_a_text_may_be_left_and_another_run_in_between(model: CountingModel, sampling: SamplingParams) -> None:
    other = prompt(14, 3)
    expected, others = plain(model, 20, sampling), plain(model, 20, sampling, other)
    drafter = Knowing(prompt() + expected, MISTAKES["each-third"])
    engine = speculative(model, drafter, 3)
    left = engine.generate(prompt(), max_tokens=20, sampling=sampling, eos_ids=())
    right = engine.generate(other, max_tokens=20, sampling=sampling, eos_ids=())
    pairs = [(next(left), next(right)) for _ in range(20)]
    assert ([one for one, _ in pairs], [one for _, one in pairs]) == (expected, others)


def test_an_interrupt_leaves_nothing_behind(model: CountingModel) -> None:
    expected = plain(model, 20)
    drafter = Knowing(prompt() + expected)
    engine = speculative(model, drafter, 3)
    tokens = engine.generate(prompt(), max_tokens=20, sampling=GREEDY, eos_ids=())
    found = [next(tokens) for _ in range(5)]
    logits = model.logits

    def stop(_hidden: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model.logits = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(tokens)
    model.logits = logits  # type: ignore[method-assign]
    more = engine.generate(prompt() + found, max_tokens=20 - len(found), sampling=GREEDY, eos_ids=())
    assert found + list(more) == expected
    for hidden, position in zip(drafter.rows, range(drafter.length), strict=True):
        alone = model.hidden(torch.tensor((prompt() + expected)[: position + 1]), LatentCache(model.config, CTX))
        assert torch.equal(hidden, alone[-1])


def test_logits_of_a_text_do_not_disturb_it(model: CountingModel) -> None:
    expected = plain(model, 10)
    drafter = Knowing(prompt() + expected)
    engine = speculative(model, drafter, 2)
    tokens = engine.generate(prompt(), max_tokens=10, sampling=GREEDY, eos_ids=())
    found = [next(tokens) for _ in range(4)]
    engine.logits(prompt(30, 4))
    engine.last_logits(prompt(6, 5))
    assert found + list(tokens) == expected


@pytest.fixture
def drafter(
    reference: SimpleNamespace,
    tiny_configs: dict[str, dict[str, Any]],
    tiny_mtp_weights: Callable[[str], dict[str, Tensor]],
) -> Drafter:
    """A real one, over a random MTP layer."""
    config = ModelConfig.from_dict(tiny_configs["kimi"])
    return Drafter(MtpModule(config, reference.tiny.DictStore(tiny_mtp_weights("kimi"))), CTX)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("always", [True, False])
def test_a_real_drafter_among_texts_that_go_back_and_forth(
    model: CountingModel, drafter: Drafter, sampling: SamplingParams, always: bool
) -> None:
    pace = Turns(lambda turn: always or turn % 7 < 4, is_always=always)
    engine = speculative(model, drafter, 2, pace, pass_tokens=8)
    base = prompt(30)
    for ids in (base, base, base[:17], base[:17] + prompt(8, 2), base + prompt(5, 3), prompt(6, 4), base[:1]):
        ours = list(engine.generate(ids, max_tokens=6, sampling=sampling, eos_ids=()))
        assert ours == plain(model, 6, sampling, ids)


def test_a_state_that_was_used_up_is_made_again(model: CountingModel, drafter: Drafter) -> None:
    """Without it the layer would have to begin anew behind every branch of a text."""
    engine, ids = speculative(model, drafter, 1, Turns(is_always=True)), prompt(30)
    list(engine.generate(ids, max_tokens=6, sampling=GREEDY, eos_ids=()))
    model.passes.clear()
    list(engine.generate(ids[:20] + prompt(5, 2), max_tokens=1, sampling=GREEDY, eos_ids=()))
    assert model.passes == [6]
    assert (drafter.length, drafter.waiting) == (25, 1)


def test_on_makes_an_entry_for_every_position_of_a_prompt(model: CountingModel, drafter: Drafter) -> None:
    engine = speculative(model, drafter, 1, Turns(is_always=True), pass_tokens=8)
    tokens = engine.generate(prompt(30), max_tokens=5, sampling=GREEDY, eos_ids=())
    next(tokens)
    assert (drafter.length, drafter.waiting) == (30, 1)  # the last one waits for the token that was just chosen


def test_otherwise_the_end_of_a_prompt_waits_for_the_first_guess(
    model: CountingModel, drafter: Drafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.speculative.KEPT_POSITIONS", 10)
    monkeypatch.setattr("runner.speculative._MOST_WAITING", 20)
    pace = Turns(lambda turn: turn > 2)
    engine = speculative(model, drafter, 1, pace, pass_tokens=8)
    tokens = engine.generate(prompt(30), max_tokens=8, sampling=GREEDY, eos_ids=())
    found = [next(tokens) for _ in range(3)]
    assert (drafter.length, drafter.waiting) == (32, 18)  # ten were left of 24
    next_one = next(tokens)
    assert (drafter.length, drafter.waiting) == (34, 2)
    found += [next_one, *tokens]
    assert found == plain(model, 8, ids=prompt(30))
    assert [told["is_usual"] for told in pace.told[:5]] == [False, True, True, False, True]


def test_the_first_pass_of_a_text_has_no_guesses(model: CountingModel) -> None:
    """It counts for the prompt, also where the cache holds all of that but the last token."""
    expected = plain(model, 12)
    engine = speculative(model, Knowing(prompt() + expected), 3)
    assert generate(engine, 5) == expected[:5]
    model.passes.clear()
    more = engine.generate(prompt() + expected[:5], max_tokens=7, sampling=GREEDY, eos_ids=())
    assert list(more) == expected[5:]
    assert model.passes[0] == 1
