"""Guesses are those of the MTP layer over the whole text, whatever happened before."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.drafter import Drafter, Takes
from runner.model import Model
from runner.mtp import MtpModule
from runner.sampling import SamplingParams, sample

GREEDY = SamplingParams()
RANDOM = SamplingParams(temperature=2.0, seed=5)
CTX = 64


class Parts:
    """A main model and the MTP layer behind it."""

    def __init__(self, config: ModelConfig, weights: Any) -> None:
        self.config = config
        self.model = Model(config, weights)
        self.mtp = MtpModule(config, weights)

    def states(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """The stream of every position and its normed form."""
        stream = self.model.stream(torch.tensor(ids), LatentCache(self.config, CTX))
        return stream, self.model.norm(stream)

    def told(self, drafter: Drafter, ids: list[int], begin: int, end: int) -> None:
        """Tell a drafter of positions of a text."""
        stream, normed = self.states(ids)
        drafter.observe(begin, stream[begin:end], normed[begin:end])

    def fresh(
        self, ids: list[int], count: int, sampling: SamplingParams = GREEDY, takes: Takes = "normed"
    ) -> list[int]:
        """The guesses of a drafter that was told everything at once."""
        drafter = Drafter(self.mtp, CTX, takes=takes)
        self.told(drafter, ids, 0, len(ids) - 1)
        return drafter.propose(ids, count, sampling)


@pytest.fixture(scope="module")
def parts(
    reference: SimpleNamespace,
    tiny_configs: dict[str, dict[str, Any]],
    tiny_mtp_weights: Callable[[str], dict[str, Tensor]],
) -> Parts:
    return Parts(ModelConfig.from_dict(tiny_configs["kimi"]), reference.tiny.DictStore(tiny_mtp_weights("kimi")))


def text(count: int, seed: int = 1) -> list[int]:
    return torch.randint(2, 288, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("takes", ["normed", "stream"])
def test_the_first_guess_is_the_layers_own(parts: Parts, takes: Takes) -> None:
    ids = text(12)
    stream, normed = parts.states(ids[:-1])
    given = normed if takes == "normed" else stream
    out = parts.mtp.stream(given, torch.tensor(ids[1:]), parts.mtp.new_cache(CTX))
    expected = int(parts.mtp.logits(parts.mtp.norm(out[-1:])).argmax())
    assert parts.fresh(ids, 1, takes=takes) == [expected]


@pytest.mark.parametrize("takes", ["normed", "stream"])
def test_later_guesses_are_made_of_the_layers_own_output(parts: Parts, takes: Takes) -> None:
    ids = text(12)
    stream, normed = parts.states(ids[:-1])
    hidden, guesses = (normed if takes == "normed" else stream), list[int]()
    for _ in range(3):
        following = torch.tensor([*ids[1:], *guesses])
        out = parts.mtp.stream(hidden, following, parts.mtp.new_cache(CTX))[-1:]
        guesses.append(int(parts.mtp.logits(parts.mtp.norm(out)).argmax()))
        hidden = torch.cat([hidden, parts.mtp.norm(out) if takes == "normed" else out])
    assert parts.fresh(ids, 3, takes=takes) == guesses


def test_the_two_ways_differ(parts: Parts) -> None:
    texts = [text(12, seed) for seed in range(8)]
    assert [parts.fresh(ids, 2) for ids in texts] != [parts.fresh(ids, 2, takes="stream") for ids in texts]


def test_guesses_are_chosen_with_the_random_numbers_of_their_positions(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, asked = text(12), list[tuple[SamplingParams, int]]()

    def watched(logits: Tensor, sampling: SamplingParams, position: int) -> int:
        asked.append((sampling, position))
        return sample(logits, sampling, position)

    monkeypatch.setattr("runner.drafter.sample", watched)
    parts.fresh(ids, 3, RANDOM)
    assert asked == [(RANDOM, 12), (RANDOM, 13), (RANDOM, 14)]


@pytest.mark.parametrize("sizes", [[11], [1] * 11, [4, 6, 1], [1, 10]])
def test_it_may_be_told_in_parts_and_guess_in_between(parts: Parts, sizes: list[int]) -> None:
    ids, drafter, begin = text(12), Drafter(parts.mtp, CTX), 0
    for size in sizes:
        parts.told(drafter, ids, begin, begin + size)
        begin += size
        assert drafter.waiting == size
        assert drafter.propose(ids[: begin + 1], 3, GREEDY) == parts.fresh(ids[: begin + 1], 3)
        assert drafter.waiting == 0


@pytest.mark.parametrize("entered", [True, False])
@pytest.mark.parametrize("length", [1, 5, 10, 11])
def test_a_text_may_go_on_otherwise(parts: Parts, entered: bool, length: int) -> None:
    """From any point, whether the entries were made already or not."""
    ids, drafter = text(12), Drafter(parts.mtp, CTX)
    parts.told(drafter, ids, 0, 11)
    if entered:
        drafter.propose(ids, 2, GREEDY)
    branch = ids[:length] + text(8, 2)
    begin = drafter.rewind(length)
    assert begin == (length - 1 if entered else length)
    assert drafter.length == begin
    parts.told(drafter, branch, begin, len(branch) - 1)
    assert drafter.propose(branch, 3, GREEDY) == parts.fresh(branch, 3)


def test_what_was_told_of_wrong_guesses_is_forgotten(parts: Parts) -> None:
    """As after a pass that checked three guesses, of which one was right."""
    ids, drafter = text(16), Drafter(parts.mtp, CTX)
    parts.told(drafter, ids, 0, 9)
    drafter.propose(ids[:10], 3, GREEDY)
    checked = [*ids[:11], 7, 8]
    parts.told(drafter, checked, 9, 13)
    assert drafter.rewind(11) == 11
    assert drafter.propose(ids[:12], 3, GREEDY) == parts.fresh(ids[:12], 3)


def test_rewinding_to_what_is_not_known_changes_nothing(parts: Parts) -> None:
    ids, drafter = text(12), Drafter(parts.mtp, CTX)
    parts.told(drafter, ids, 0, 6)
    assert drafter.rewind(9) == 9
    assert drafter.rewind(6) == 6
    assert drafter.length == 6
    assert drafter.propose(ids[:7], 2, GREEDY) == parts.fresh(ids[:7], 2)


def test_back_to_nothing(parts: Parts) -> None:
    ids, drafter = text(12), Drafter(parts.mtp, CTX)
    parts.told(drafter, ids, 0, 11)
    drafter.propose(ids, 1, GREEDY)
    assert drafter.rewind(0) == 0
    other = text(9, 3)
    parts.told(drafter, other, 0, 8)
    assert drafter.propose(other, 2, GREEDY) == parts.fresh(other, 2)


def test_without_news_there_are_no_guesses(parts: Parts) -> None:
    ids, drafter = text(12), Drafter(parts.mtp, CTX)
    assert drafter.propose(ids, 2, GREEDY) == []
    parts.told(drafter, ids, 0, 11)
    assert drafter.propose(ids[:11], 2, GREEDY) == []
    assert drafter.propose(ids, 0, GREEDY) == []
    assert drafter.propose(ids, 2, GREEDY) != []
    assert drafter.propose(ids, 2, GREEDY) == []


def test_a_gap_begins_a_new_text_for_the_layer(parts: Parts) -> None:
    """Positions count from the first that is known: rotary positions are relative."""
    ids, drafter = text(20), Drafter(parts.mtp, CTX)
    parts.told(drafter, ids, 0, 4)
    drafter.enter(ids[:5])
    parts.told(drafter, ids, 10, 19)
    assert (drafter.length, drafter.waiting) == (19, 9)
    _, normed = parts.states(ids)
    out = parts.mtp.stream(normed[10:19], torch.tensor(ids[11:]), parts.mtp.new_cache(CTX))
    assert drafter.propose(ids, 1, GREEDY) == [int(parts.mtp.logits(parts.mtp.norm(out[-1:])).argmax())]
    assert drafter.rewind(10) == 10  # before everything that is known
    assert drafter.length == 10


def test_dropping_keeps_the_last(parts: Parts) -> None:
    ids, drafter = text(20), Drafter(parts.mtp, CTX)
    parts.told(drafter, ids, 0, 19)
    drafter.drop(keep=5)
    assert (drafter.length, drafter.waiting) == (19, 5)
    other = Drafter(parts.mtp, CTX)
    parts.told(other, ids, 14, 19)
    assert drafter.propose(ids, 2, GREEDY) == other.propose(ids, 2, GREEDY)


def test_a_full_cache_ends_the_chain(parts: Parts) -> None:
    ids, drafter = text(12), Drafter(parts.mtp, 12)
    parts.told(drafter, ids, 0, 11)
    assert drafter.propose(ids, 5, GREEDY) == parts.fresh(ids, 2)


def test_an_interrupt_among_guesses_leaves_no_entry_behind(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, drafter = text(14), Drafter(parts.mtp, CTX)
    parts.told(drafter, ids, 0, 11)
    norm, calls = parts.mtp.norm, iter([0, 0, 1])

    def interrupted(stream: Tensor) -> Tensor:
        if next(calls):
            raise KeyboardInterrupt
        return norm(stream)

    with monkeypatch.context() as patch:
        patch.setattr(parts.mtp, "norm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drafter.propose(ids[:12], 3, GREEDY)
    parts.told(drafter, ids, 11, 13)
    assert drafter.propose(ids, 2, GREEDY) == parts.fresh(ids, 2)


@pytest.mark.parametrize("takes", ["normed", "stream"])
def test_kept_rows_hold_no_more_memory_than_they_need(parts: Parts, takes: Takes) -> None:
    ids, drafter = text(40), Drafter(parts.mtp, CTX, takes=takes)
    parts.told(drafter, ids, 0, 39)
    drafter.enter(ids[:39])
    assert drafter.waiting == 1
    assert sum(rows.untyped_storage().nbytes() for rows in drafter._rows) == parts.config.hidden_size * 4
