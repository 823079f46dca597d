"""`--speculate` on the embedded model, whose MTP layer is trained: the same text, and guesses that are often right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from runner import demo, kernels

Call = Callable[..., Result]
PROMPT = "def read_file(path):"


def generated(call: Call, *options: str) -> dict[str, Any]:
    result = call("generate", "-p", PROMPT, "-n", "60", "--json", *options)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("sampling", [(), ("--temp", "0.8", "--top-k", "30", "--seed", "4")], ids=["greedy", "sampled"])
def test_the_text_is_the_same_and_guesses_are_right_often(call: Call, sampling: tuple[str, ...]) -> None:
    off = generated(call, "--speculate", "off", *sampling)
    assert off["speculation"] == {"state": "off", "reason": None}
    for options in (("on",), ("on", "--draft-tokens", "3"), ("on", "--mtp-input", "stream"), ("auto",)):
        found = generated(call, "--speculate", *options, *sampling)
        assert (found["ids"], found["text"]) == (off["ids"], off["text"])
        assert found["finish_reason"] == off["finish_reason"]
        if options == ("on",):
            assert found["speculation"]["state"] == "on"
            # A third is far more than chance, and fewer than the layer gets right.
            assert found["speculation"]["acceptance"] > (0.33 if not sampling else 0.15)
            assert found["speculation"]["passes"] < 59


def test_figures_come_on_stderr(call: Call) -> None:
    result = call("generate", "-p", PROMPT, "-n", "30", "--speculate", "on")
    assert "\nspeculation: " in result.stderr
    assert " passes with guesses, " in result.stderr
    assert "speculation" not in call("generate", "-p", PROMPT, "-n", "4", "--speculate", "off").stderr
    assert "speculation" not in call("generate", "-p", PROMPT, "-n", "4", "--quiet").stderr
    short = call("generate", "-p", PROMPT, "-n", "4")
    assert "speculation: no guesses were made: the text is too short to try" in short.stderr


def test_a_model_without_the_layer(tiny_checkpoint: Path, call: Call) -> None:
    result = call("generate", "-m", str(tiny_checkpoint), "-p", "hello", "-n", "4")
    assert result.exit_code == 0
    assert "note: speculation is off: this model has no MTP layer" in result.stderr
    refused = call("generate", "-m", str(tiny_checkpoint), "-p", "hello", "-n", "4", "--speculate", "on")
    assert refused.exit_code == 14
    assert refused.stdout == ""
    assert "cannot speculate: this model has no MTP layer" in refused.stderr


def test_rounded_activations_take_one_guess_at_a_time(call: Call) -> None:
    """Two rows of a pass are computed as one is; more may be rounded otherwise."""
    rounded = ("--dtype", "bfloat16")
    off = generated(call, "--speculate", "off", *rounded)
    on = generated(call, "--speculate", "on", "--draft-tokens", "3", *rounded)
    assert on["ids"] == off["ids"]
    assert on["speculation"]["guesses"] == on["speculation"]["passes"] > 10
    told = call("generate", "-p", PROMPT, "-n", "4", "--draft-tokens", "3", *rounded)
    assert "with --dtype bfloat16 one token is guessed at a time, so --draft-tokens does nothing" in told.stderr


@pytest.mark.usefixtures("torch_alone")
def test_products_whose_rows_depend_on_each_other_cannot_check_guesses(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    result = call("generate", "-p", PROMPT, "-n", "4")
    assert result.exit_code == 0
    assert "note: speculation is off: products are not compiled here" in result.stderr
    refused = call("generate", "-p", PROMPT, "-n", "4", "--speculate", "on")
    assert (refused.exit_code, refused.stdout) == (14, "")
    assert "cannot speculate: products are not compiled here" in refused.stderr


def test_a_stop_string_ends_it_at_the_same_place(call: Call) -> None:
    whole = generated(call, "--speculate", "off")["text"]
    # Three letters from the middle, so that the stop is likely to end within what one pass gave.
    for at in range(40, 80, 7):
        stop = whole[at : at + 3]
        off = generated(call, "--speculate", "off", "--stop", stop)
        on = generated(call, "--speculate", "on", "--draft-tokens", "3", "--stop", stop)
        assert (
            (on["text"], on["finish_reason"]) == (off["text"], off["finish_reason"]) == (whole.split(stop)[0], "stop")
        )


def test_a_chat_of_several_turns_is_the_same(call: Call, tmp_path: Path) -> None:
    folder = shutil.copytree(demo.path(), tmp_path / "model")
    template = "{% for message in messages %}# {{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    turns = "def load(path):\nimport os\n/reset\nclass Node:\n    def __init__(self):\n"
    said = {
        mode: call("chat", "-m", folder, "-n", "24", "-q", "--speculate", *mode.split(), stdin=turns)
        for mode in ("off", "on", "auto", "on --draft-tokens 4")
    }
    assert {result.exit_code for result in said.values()} == {0}
    assert len(said["off"].stdout) > 100
    assert {result.stdout for result in said.values()} == {said["off"].stdout}
