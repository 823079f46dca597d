"""`runner logits` and `runner eval`: what they print, write and promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from runner.loaded import LoadedModel

Call = Callable[..., Result]
Document = Callable[..., dict[str, Any]]


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint, by a short name."""
    return tiny_checkpoint


# --- logits ---


def test_logits_document(tiny: Path, document: Document) -> None:
    found = document("logits", "-m", tiny, "-p", "hello")
    assert list(found) == ["ids", "vocab_size", "dtype", "top", "out"]
    assert [list(row) for row in found["top"]] == [["id", "token", "logit", "probability"]] * 5
    loaded = LoadedModel(tiny)
    last = loaded.logits("hello")[-1]
    assert (found["ids"], found["vocab_size"], found["out"]) == (loaded.text.encode("hello"), 300, None)
    assert [row["id"] for row in found["top"]] == last.topk(5).indices.tolist()
    expected = last.double().softmax(0).topk(5).values.tolist()
    assert [row["probability"] for row in found["top"]] == pytest.approx(expected)


def test_logits_of_exactly_these_ids(tiny: Path, document: Document) -> None:
    assert document("logits", "-m", tiny, "--ids", "5, 7,9")["ids"] == [5, 7, 9]


def test_the_top_five_for_people(tiny: Path, call: Call, document: Document) -> None:
    result = call("logits", "-m", tiny, "-p", "hello")
    rows = [line.split() for line in result.stdout.splitlines()]
    found = document("logits", "-m", tiny, "-p", "hello")["top"]
    assert [int(row[0]) for row in rows] == [row["id"] for row in found]
    assert [row[1] for row in rows] == [f"{row['probability']:.3%}" for row in found]


def test_the_file_of_logits(tiny: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "logits.safetensors"
    result = call("logits", "-m", tiny, "-p", "hello", "--out", out)
    assert result.exit_code == 0
    written = load_file(out)
    loaded = LoadedModel(tiny)
    assert written.keys() == {"ids", "logits"}
    assert (written["ids"].dtype, written["logits"].dtype) == (torch.int64, torch.float32)
    assert written["ids"].tolist() == loaded.text.encode("hello")
    assert torch.equal(written["logits"], loaded.logits("hello"))
    assert [path.name for path in tmp_path.iterdir()] == ["logits.safetensors"]


def test_bfloat16_rounds_a_little(tiny: Path, document: Document) -> None:
    exact, rounded = (
        document("logits", "-m", tiny, "-p", "hello", "--dtype", dtype) for dtype in ("float32", "bfloat16")
    )
    difference = abs(exact["top"][0]["logit"] - rounded["top"][0]["logit"])
    assert 0 < difference < 0.2


def test_ids_need_no_tokenizer(tiny_copy: Path, call: Call, document: Document) -> None:
    (tiny_copy / "tokenizer.json").unlink()
    assert document("logits", "-m", tiny_copy, "--ids", "0,5")["top"][0]["token"] is None
    assert call("logits", "-m", tiny_copy, "--ids", "0,5").exit_code == 0
    assert call("logits", "-m", tiny_copy, "-p", "hello").exit_code == 10


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        ([], 2),
        (["-p", "a", "--ids", "1"], 2),
        (["--ids", "1,x"], 2),
        (["--ids", ""], 2),
        (["--ids", "-1"], 2),
        (["--ids", "300"], 1),
        (["--ids", "1", "--out", "absent/folder/x.safetensors"], 10),
        (["--ids", "1", "--dtype", "float16"], 2),
    ],
)
def test_logits_refuses(tiny: Path, arguments: list[str], exit_code: int, call: Call) -> None:
    result = call("logits", "-m", tiny, *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr


# --- eval ---


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "one.txt", tmp_path / "two.txt"
    first.write_bytes("hello \u20ac\r\nhell".encode())
    second.write_bytes(b"def hello(): pass\n")
    return first, second


def test_eval_document(tiny: Path, texts: tuple[Path, Path], document: Document) -> None:
    found = document("eval", "-m", tiny, "-f", texts[0], "-f", texts[1], "--ctx", "6")
    figures = ["tokens", "bytes", "nll", "perplexity", "bits_per_byte"]
    read = ["read_bytes", "wait_s", "fetched_bytes", "fetch_wait_s", "resident_bytes"]
    assert list(found) == [*figures, "ctx", "seconds", *read, "files"]
    assert [list(one) for one in found["files"]] == [["file", *figures]] * 2
    assert [one["bytes"] for one in found["files"]] == [path.stat().st_size for path in texts]
    loaded = LoadedModel(tiny)
    tokens = [len(loaded.text.encode(path.read_bytes().decode())) - 1 for path in texts]
    assert [one["tokens"] for one in found["files"]] == tokens
    assert (found["tokens"], found["bytes"]) == (sum(tokens), sum(path.stat().st_size for path in texts))
    assert found["nll"] == pytest.approx(sum(one["nll"] for one in found["files"]))
    assert found["ctx"] == 6


def test_eval_for_people(tiny: Path, texts: tuple[Path, Path], call: Call) -> None:
    result = call("eval", "-m", tiny, "-f", texts[0], "-f", texts[1])
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(texts[0]), str(texts[1]), "all"]
    assert all("bits per byte, perplexity" in line for line in lines)
    assert "tokens/s" in result.stderr
    one = call("eval", "-m", tiny, "-f", texts[0], "-q")
    assert (len(one.stdout.splitlines()), one.stderr) == (1, "")


@pytest.mark.parametrize(
    ("content", "exit_code", "message"),
    [(None, 10, "no such file"), (b"", 1, "empty"), (b"\xff", 1, "not UTF-8")],
)
def test_eval_refuses(
    tiny: Path, tmp_path: Path, content: bytes | None, exit_code: int, message: str, call: Call
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    result = call("eval", "-m", tiny, "-f", path)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr


def test_eval_needs_a_file_and_a_window(tiny: Path, texts: tuple[Path, Path], call: Call) -> None:
    assert call("eval", "-m", tiny).exit_code == 2
    assert call("eval", "-m", tiny, "-f", texts[0], "--ctx", "1").exit_code == 2
    assert call("eval", "-m", tiny, "-f", texts[0], "--ctx", "513").exit_code == 15
