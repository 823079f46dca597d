"""What the commands say of GGUF files, and do with one that is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

import manifests
from reshard.forecast import needed_inodes
from reshard.plan import Plan
from reshard.run import needed_bytes
from reshard.source import SourceCheckpoint, read_source
from tests.gguf_files import CONFIG, stored_bytes, write_gguf
from tests.gguf_tokenizers import TRAINING, add_tokenizer, train

Program = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]
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


def test_verify_against_a_file_that_was_not_the_source(one: Path, program: Program, tmp_path: Path) -> None:
    """The right one lies beside it, and would be compared in its place."""
    out, other = tmp_path / "out", one.with_name("other.gguf")
    assert program("reshard", "run", one, out).code == 0
    assert program("reshard", "verify", out, "--against", one).code == 0
    other.write_bytes(b"another")
    for path in (other, one.with_name("absent.gguf")):
        result = program("reshard", "verify", out, "--against", path)
        assert (result.code, result.out) == (1, "")
        assert f"{path}: is none of the files that {out} was made from; give its tiny.gguf, or the folder" in result.err
    size = one.stat().st_size
    one.unlink()
    result = program("reshard", "verify", out, "--against", one)
    assert (result.code, result.out) == (13, f"tiny.gguf: bytes 0-{size}: no such file\n")


def test_repair_from_one_file_of_a_set(split: list[Path], program: Program, tmp_path: Path, tree: Tree) -> None:
    out = tmp_path / "out"
    assert program("reshard", "run", split[0], out).code == 0
    whole = tree(out)
    damaged = ["model/head.safetensors", "layers/0/dense.safetensors", "config.json", "source/headers/2.zst"]
    for name in damaged:
        (out / name).unlink()
    result = program("reshard", "repair", out, "--from", split[1])
    assert result.code == 0
    assert tree(out) == whole
    # What is left of a set is taken as far as it goes.
    (out / "model/head.safetensors").unlink()
    split[0].unlink()
    result = program("reshard", "repair", out, "--from", split[-1])
    assert result.code == 13
    assert "has no tensor 'model.norm.weight'; it came from tiny-0000" in result.err


def test_diff_sees_what_the_metadata_says(program: Program, tmp_path: Path) -> None:
    """The same tensors with another scale of the experts are another model."""
    for name, change in (("a", None), ("b", {"expert_weights_scale": 1.0}), ("c", None)):
        write_gguf(tmp_path / f"{name}.gguf", change=change)
        assert program("reshard", "run", tmp_path / f"{name}.gguf", tmp_path / name).code == 0
    assert program("manifests", "diff", tmp_path / "a", tmp_path / "c").code == 0
    result = program("manifests", "diff", tmp_path / "a", tmp_path / "b")
    assert result.code == 1
    assert result.out.startswith("document config.json: ")


def test_diff_says_that_types_differ_before_the_bytes_of_rows(program: Program, tmp_path: Path) -> None:
    def smaller(name: str, shape: tuple[int, ...], kind: Any) -> Any:
        kind = Type.Q8_0 if name == "output.weight" else kind
        return kind, stored_bytes(name, shape, kind)

    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", data=smaller)
    result = program("manifests", "diff", tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert "tensor lm_head.weight: encoding Q6_K against Q8_0" in result.out


def test_a_tokenizer_that_is_not_known_can_be_put_beside_the_file(program: Program, tmp_path: Path) -> None:
    """What the remark advises is then done: the file's own would not be taken."""
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, tokenizer=lambda writer: writer.add_tokenizer_model("llama"))
    advice = "put the model's own tokenizer.json beside the file"
    for source, said in ((path, f"{advice}, and name their folder)"), (path.parent, f"{advice})")):
        remark = next(one for one in program("reshard", "plan", source, "--json").json["left_out"])
        assert remark.startswith("the tokenizer (the GGUF metadata has tokenizer.ggml.model 'llama'")
        assert remark.endswith(said)
    (path.parent / "tokenizer.json").write_text("{}", encoding="utf-8")
    plan = program("reshard", "plan", path.parent, "--json").json
    assert (plan["auxiliary"], plan["left_out"]) == (["tokenizer.json"], [])


def test_a_tokenizer_of_the_folder_is_taken_in_place_of_the_files_own(
    one: Path, program: Program, tmp_path: Path
) -> None:
    (one.parent / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert program("reshard", "run", one.parent, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    roles = {document.path: document.role for document in manifests.load(tmp_path / "out").documents}
    assert (roles["tokenizer.json"], roles["tokenizer_config.json"]) == ("auxiliary", "generated")
    # Of a file that was named nothing beside it is taken.
    assert program("reshard", "run", one, tmp_path / "named").code == 0
    assert (tmp_path / "named" / "tokenizer.json").stat().st_size > 2


def test_small_files_stay_when_the_file_alone_is_named_later(
    one: Path, program: Program, tmp_path: Path, tree: Tree
) -> None:
    (one.parent / "tokenizer.json").write_text('{"somebody": "\'s own"}')
    out = tmp_path / "out"
    assert program("reshard", "run", one.parent, out, "--layers", "0").code == 0
    before = {document.path: document for document in manifests.open(out).manifest.documents}
    assert program("reshard", "run", one, out, "--layers", "1").code == 0
    documents = {document.path: document for document in manifests.open(out).manifest.documents}
    for name in ("notes.txt", "tokenizer.json"):
        assert documents[name] == before[name]
        assert documents[name].role == "auxiliary"
    verified = json.loads(program("reshard", "verify", out, "--json").out.splitlines()[-1])
    assert (verified["ok"], verified["unnamed"]) == (True, [])
    assert program("reshard", "run", one.parent, tmp_path / "once", "--layers", "0-1").code == 0
    assert tree(out) == tree(tmp_path / "once")
