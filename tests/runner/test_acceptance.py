"""Acceptance: at every place of a text, and in use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from runner import acceptance
from runner.acceptance import Counts, Neighbours, beginnings, continued, teacher_forced
from runner.cache import LatentCache
from runner.drafter import Takes
from runner.loaded import LoadedModel

Call = Callable[..., Result]
TEXT = 'def read_file(path):\n    """Read a file."""\n    with open(path) as file:\n        return file.read()\n'


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(speculate="on", draft_tokens=2, ctx=200)


def test_guesses_at_every_place_are_those_of_the_layer(loaded: LoadedModel) -> None:
    """The first of each row against the layer over the whole text at once."""
    ids = loaded.text.encode(TEXT)
    model, mtp = loaded.model, loaded.mtp_module
    assert mtp is not None
    hidden = model.hidden(torch.tensor(ids), LatentCache(model.config, len(ids)))
    chosen = model.logits(hidden).argmax(-1)
    out = mtp.stream(hidden[:-1], torch.tensor(ids[1:]), mtp.new_cache(len(ids)))
    guessed = mtp.logits(mtp.norm(out)).argmax(-1)
    found = list(teacher_forced(model, mtp, ids, 1))
    assert found == [(0, *pair) for pair in zip(guessed[:-1].tolist(), chosen[1:-1].tolist(), strict=True)]
    assert 0.2 < sum(guess == one for _, guess, one in found) / len(found) < 1


@pytest.mark.parametrize("takes", ["normed", "stream"])
def test_later_places_follow_from_the_texts_own_tokens(loaded: LoadedModel, takes: Takes) -> None:
    ids = loaded.text.encode(Path(acceptance.__file__).read_text())[:150]
    mtp = loaded.mtp_module
    assert mtp is not None
    found = list(teacher_forced(loaded.model, mtp, ids, 3, takes=takes))
    places = [place for place, _, _ in found]
    assert places == [0, 1, 2] * 146 + [0, 1] + [0]  # at the end there is nothing left to compare with
    first_ones = [one for one in found if one[0] == 0]
    assert first_ones == list(teacher_forced(loaded.model, mtp, ids, 1, takes=takes))
    # By hand, all second guesses.
    model = loaded.model
    stream = model.stream(torch.tensor(ids), LatentCache(model.config, len(ids)))
    hidden = model.norm(stream) if takes == "normed" else stream
    chosen, expected = model.logits(model.norm(stream)).argmax(-1), []
    for position in range(147):
        cache = mtp.new_cache(150)
        first = mtp.stream(hidden[: position + 1], torch.tensor(ids[1 : position + 2]), cache)[-1:]
        first = mtp.norm(first) if takes == "normed" else first
        second = mtp.norm(mtp.stream(first, torch.tensor([ids[position + 2]]), cache))
        expected.append((1, int(mtp.logits(second).argmax()), int(chosen[position + 2])))
    assert [one for one in found if one[0] == 1] == expected


def test_counts_in_use_are_those_of_the_passes(loaded: LoadedModel) -> None:
    count, again = Counts.zeros(2), Counts.zeros(2)
    ids = loaded.text.encode("def read_file(path):")
    assert loaded.speculation is not None
    pace = loaded.speculation.pace
    text = continued(loaded.engine, pace, ids, tokens=40, eos_ids=(), count=count)
    assert len(text) == 40
    # The prompt gives a token, each pass one and those that were guessed right; the last may have no room for guesses.
    assert 40 - 1 - count.tried[0] - sum(count.right) in (0, 1)
    assert count.right[0] - count.tried[1] in (0, 1)
    assert continued(loaded.engine, pace, ids, tokens=40, eos_ids=(), count=again) == text
    assert (again.tried, again.right) == (count.tried, count.right)
    assert count.rates[0] == count.right[0] / count.tried[0]
    assert Counts.zeros(1).rates == [None]


def test_neighbours_choose_together() -> None:
    two = Neighbours(2)
    two.observe(3, torch.tensor([[0, 1], [1, 2], [1, 2], [5, 6]]))
    assert two.mean == pytest.approx((3 + 2 + 4) / 3)
    assert Neighbours(2).mean is None


def test_beginnings_are_spread_over_a_text() -> None:
    ids = list(range(100))
    assert beginnings(ids, 10, 4) == [ids[0:10], ids[25:35], ids[50:60], ids[75:85]]
    assert beginnings(ids[:7], 10, 4) == [ids[:7]]
    assert beginnings(ids[:25], 10, 4) == [ids[0:10], ids[12:22]]


# --- the command ---


def test_the_embedded_model(call: Call) -> None:
    result = call("mtp")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == (
        "layer      4: 412 tensors, 7.85 MB (experts 3.15 MB, copies 4.19 MB, dense 511 kB)"
    )
    assert result.stdout.splitlines()[-1] == "can run    yes"


def test_a_text(tmp_path: Path, call: Call) -> None:
    file = tmp_path / "text.py"
    file.write_text(TEXT * 3)
    options = ("-f", str(file), "-n", "48", "--draft-tokens", "2")
    found = json.loads(call("mtp", *options, "--json").stdout)
    assert found["fault"] is None
    assert found["teacher_forced"]["guesses"] == [46, 45]
    for way in ("teacher_forced", "free_running"):
        assert 0.2 < found[way]["acceptance"][0] <= 1
    assert 8 < found["experts_of_neighbours"] < 24
    assert [(one["hits"], one["guesses"]) for one in found["gains"]] == [(1.0, 1), (1.0, 2), (0.25, 1), (0.25, 2)]
    card = [line.split()[0] for line in call("mtp", *options).stdout.splitlines()]
    assert card == ["layer", "copy", "copy", "can", "guess", "1", "2", "pays", "pays", "pays", "pays"]


def test_rounded_activations(tmp_path: Path, call: Call) -> None:
    """They take one guess at a time."""
    file = tmp_path / "text.py"
    file.write_text(TEXT * 3)
    result = call("mtp", "-f", str(file), "-n", "32", "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["free_running"]["acceptance"]) == 1
    assert "--draft-tokens does nothing" in result.stderr


def test_a_text_that_is_too_short(tmp_path: Path, call: Call) -> None:
    (tmp_path / "empty.py").write_text("")
    result = call("mtp", "-f", str(tmp_path / "empty.py"))
    assert result.exit_code == 1
    assert "too short to measure acceptance on" in result.stderr


def test_tokens_of_a_pass_by_place() -> None:
    assert Counts([10, 5, 0], [5, 4, 0]).tokens(2) == pytest.approx(1 + 0.5 + 0.4)
    assert Counts([10, 5, 0], [5, 4, 0]).tokens(3) is None


def test_parts_of_a_text_begin_as_texts_do(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[int]] = []
    monkeypatch.setattr(acceptance, "continued", lambda _engine, _pace, ids, **_how: begun.append(list(ids)))
    (tmp_path / "text.py").write_text(Path(acceptance.__file__).read_text())
    call("mtp", "-f", str(tmp_path / "text.py"), "-n", "512", "-q")
    assert len(begun) == 4
    assert {ids[0] for ids in begun} == {begun[0][0]}
    assert len({tuple(ids[1:4]) for ids in begun}) > 1


def test_a_model_without_the_layer(tiny_checkpoint: Path, call: Call) -> None:
    result = call("mtp", "-m", str(tiny_checkpoint))
    assert result.exit_code == 14
    assert "can run    no: this model has no MTP layer" in result.stdout
    found = call("mtp", "-m", str(tiny_checkpoint), "--json")
    assert found.exit_code == 14
    assert json.loads(found.stdout)["fault"] == "this model has no MTP layer"
