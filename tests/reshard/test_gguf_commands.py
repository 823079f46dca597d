"""What the commands say of GGUF files, and do with one that is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reshard.forecast import needed_inodes
from reshard.plan import Plan
from reshard.run import needed_bytes
from reshard.source import SourceCheckpoint, read_source
from tests.gguf_files import CONFIG, write_gguf
from tests.gguf_tokenizers import TRAINING, add_tokenizer, train

Program = Callable[..., Any]
PlanOf = Callable[..., tuple[SourceCheckpoint, Plan]]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """One file with a tokenizer, among other things of the same folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "notes.txt").write_text("somebody's", encoding="utf-8")

    def tokenizer(writer: Any) -> None:
        add_tokenizer(writer, tmp_path / "source", train("deepseek-v3", TRAINING), "deepseek-v3", rows=1300)

    write_gguf(folder / "tiny.gguf", CONFIG | {"vocab_size": 1300}, tokenizer=tokenizer)
    return folder / "tiny.gguf"


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """The files of a set, in a folder that has another set too."""
    folder = tmp_path / "split"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", split_max_tensors=9)
    write_gguf(folder / "other.gguf", new=False, split_max_tensors=9)
    return sorted(folder.glob("tiny-*.gguf"))


def test_what_is_made_of_the_metadata_is_planned(one: Path, plan_of: PlanOf, program: Program, tmp_path: Path) -> None:
    made = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    plan = program("reshard", "plan", one, "--json").json
    assert (plan["source"], plan["generated"], plan["auxiliary"]) == (str(one), made, [])
    text = program("reshard", "plan", one).out
    assert f"source     {one}: 1 shard" in text
    assert "made       config.json, tokenizer.json, tokenizer_config.json, out of what the GGUF file says" in text
    source, planned = plan_of(one)
    without = dataclasses.replace(source, generated={})
    assert needed_bytes(source, planned) - needed_bytes(without, planned) == sum(map(len, source.generated.values()))
    assert program("reshard", "run", one, tmp_path / "out").code == 0
    # The journal, which is gone; and the folder itself.
    assert needed_inodes(source, planned) == len(list((tmp_path / "out").rglob("*"))) + 2


def test_consume_asks_for_the_files_that_were_named_alone(one: Path, split: list[Path], program: Program) -> None:
    out = one.parent.parent / "out"
    result = program("reshard", "run", one, out, "--consume")
    assert result.code == 2
    assert f"--consume deletes {one} as it goes: give --yes as well" in result.err
    result = program("reshard", "run", split[1], out, "--consume")
    assert f"deletes {split[1]} and the {len(split) - 1} other files of its set as it goes" in result.err
    (one.parent / "notes.txt").unlink()
    result = program("reshard", "run", one.parent, out, "--consume")
    assert f"deletes the shards of {one.parent} as it goes" in result.err
    assert one.exists()
    assert not out.exists()


def test_a_source_has_the_path_that_was_named(one: Path) -> None:
    assert read_source(one).path == one
    assert read_source(one.parent).path == one.parent
