"""`--speculate` on the embedded model, whose MTP layer is trained: the same text, and guesses that are often right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

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
