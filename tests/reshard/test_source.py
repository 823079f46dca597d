"""What is found in a folder: shards, index, and which other files come along."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from manifests.errors import ManifestError, SourceNotFoundError
from reshard.small_files import OTHER_WEIGHT_SUFFIXES
from reshard.source import read_source

TAKEN = [
    ".gitattributes", "LICENSE", "config.json", "empty.txt", "figures/deep/benchmark 1.txt", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


def test_a_checkpoint_as_published(v3_folder: Path) -> None:
    source = read_source(v3_folder)
    assert [file.path for file in source.auxiliary] == TAKEN
    assert {file.path: file.size for file in source.auxiliary} == {p: (v3_folder / p).stat().st_size for p in TAKEN}
    assert source.left_out == (
        "'consolidated.safetensors' (weights in another form)",
        "'pytorch_model.bin' (weights in another form)",
        ".cache (hidden folder)",
        "figures/.git (hidden folder)",
    )
    assert source.index == (v3_folder / "model.safetensors.index.json").read_bytes()
    assert source.config["model_type"] == "deepseek_v3"
    assert len(source.shards) == len(list(v3_folder.glob("model-*.safetensors")))


def test_one_file_without_an_index(single_folder: Path) -> None:
    source = read_source(single_folder)
    assert source.index is None
    assert list(source.shards) == ["model.safetensors"]
    assert [file.path for file in source.auxiliary] == ["config.json"]


def test_no_config_is_no_hindrance(v3_copy: Path) -> None:
    (v3_copy / "config.json").unlink()
    assert read_source(v3_copy).config == {}


@pytest.mark.parametrize("suffix", sorted(OTHER_WEIGHT_SUFFIXES))
def test_other_weights_are_left_out_whatever_their_case(v3_copy: Path, suffix: str) -> None:
    (v3_copy / f"more{suffix}").write_bytes(b"x")
    (v3_copy / f"MORE{suffix.upper()}").write_bytes(b"x")
    left_out = read_source(v3_copy).left_out
    assert sum("more." in entry.lower() for entry in left_out) == 2


def test_what_is_no_source(v3_folder: Path, v3_resharded: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="already resharded"):
        read_source(v3_resharded)
    with pytest.raises(SourceNotFoundError, match="absent: no such folder; give the folder that holds"):
        read_source(tmp_path / "absent")
    for path in (v3_folder / "config.json", next(v3_folder.glob("model-*"))):
        with pytest.raises(SourceNotFoundError, match=f"{path}: not a folder; give the folder that holds"):
            read_source(path)
    with pytest.raises(SourceNotFoundError):
        read_source(tmp_path)


def test_shards_may_lie_in_subfolders(tmp_path: Path, v3_folder: Path) -> None:
    root = tmp_path / "nested"
    (root / "weights" / "a").mkdir(parents=True)
    weight_map = {}
    for number, path in enumerate(sorted(v3_folder.glob("model-*.safetensors"))):
        name = f"weights/a/{number}.safetensors"
        os.link(path, root / name)
        weight_map |= {
            tensor: name
            for tensor, shard in json.loads((v3_folder / "model.safetensors.index.json").read_bytes())[
                "weight_map"
            ].items()
            if shard == path.name
        }
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = read_source(root)
    assert list(source.shards) == [f"weights/a/{number}.safetensors" for number in range(len(source.shards))]
    assert source.auxiliary == ()
