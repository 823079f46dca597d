"""GGUF models as checkpoints: every tensor and every expert is where its bytes are, split or not."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import manifests
from manifests.errors import ManifestError, SourceNotFoundError, ToolkitError, UnsupportedModelError
from manifests.folder import LocalFolder
from manifests.gguf_files import read_file, with_gaps
from manifests.gguf_headers import parse_saved
from manifests.gguf_names import Stack, to_hugging_face
from manifests.names import Role, parse_name
from tests.fuzz.gguf_bytes import ARRAY, I32, STRING, U16, U32, header, place
from tests.gguf_files import CONFIG, write_gguf

Program = Callable[..., Any]
Written = dict[str, tuple[tuple[int, ...], Any, bytes]]

V2 = CONFIG | {"scoring_func": "softmax", "topk_method": "greedy", "q_lora_rank": None}
KINDS: dict[str, dict[str, Any]] = {
    "new": {"new": True},
    "old": {"new": False},
    "fused": {"fused": True},
    "lite": {"new": False, "config": V2, "router": False},
    "split": {"split_max_tensors": 11},
    "metadata_first": {"split_max_tensors": 20, "small_first_shard": True},
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Written]:
    """A folder with a model, and what was written."""
    folder = tmp_path / request.param
    folder.mkdir()
    return folder, write_gguf(folder / "tiny.gguf", **KINDS[request.param])


def expected(written: Written) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor under Hugging Face's name, stacks taken apart by numpy."""
    found = {}
    for name, (shape, kind, data) in written.items():
        target = to_hugging_face(name)
        if isinstance(target, str):
            found[target] = (kind.name, shape, data)
            continue
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        stack = np.frombuffer(data, np.uint8).reshape(shape[0], shape[1], shape[2] // elements * size)
        for expert in range(shape[0]):
            halves = np.split(stack[expert], len(target.parts))
            for part, half in zip(target.names(expert), halves, strict=True):
                found[part] = (kind.name, (len(half), shape[2]), half.tobytes())
    return found


def stored(location: manifests.Location) -> bytes:
    with Path(location.place).open("rb") as file:
        file.seek(location.offset)
        return file.read(location.size)


def test_every_tensor_is_found_with_its_bytes(model: tuple[Path, Written]) -> None:
    folder, written = model
    checkpoint = manifests.open(folder)
    should = expected(written)
    found = {location.name: location for location in checkpoint.tensors()}
    assert found.keys() == should.keys()
    for name, (kind, shape, data) in should.items():
        location = found[name]
        assert stored(location) == data, name
        assert location.logical_shape == shape
        assert (location.encoding if location.encoding != "plain" else location.dtype) == kind
        if location.encoding != "plain":
            elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            assert (location.dtype, location.shape) == ("U8", (*shape[:-1], shape[-1] // elements * size))
        else:
            assert location.shape == shape
    assert all(parse_name(name).role is not Role.UNKNOWN for name in found)
    assert checkpoint.layers == (0, 1, 2)
    assert (checkpoint.experts(0), checkpoint.experts(2)) == ((), tuple(range(5)))
    sources = {tensor.name: tensor.source_name for file in checkpoint.manifest.files for tensor in file.tensors}
    assert set(sources.values()) == written.keys()
    for ours, theirs in sources.items():
        target = to_hugging_face(theirs)
        assert ours == target or (isinstance(target, Stack) and ours in target.names(parse_name(ours).expert or 0))


def test_the_files_of_a_model_in_their_order(model: tuple[Path, Written]) -> None:
    folder, _ = model
    manifest = manifests.open(folder).manifest
    assert [file.path for file in manifest.files] == sorted(path.name for path in folder.iterdir())
    assert (manifest.layout, manifest.model.num_hidden_layers, manifest.model.n_routed_experts) == ("in_place", 3, 5)
    for file in manifest.files:
        assert (file.kind, file.size) == ("shard", (folder / file.path).stat().st_size)
        position = file.header_size
        for tensor in file.tensors:
            assert tensor.offset >= position
            position = tensor.offset + tensor.size
        assert position <= file.size
    assert len(manifest.files) == {"split": 5, "metadata_first": 4}.get(folder.name, 1)


def test_quantised_tensors_are_handed_out_as_bytes_that_say_what_they_encode(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "x.gguf")
    checkpoint = manifests.open(tmp_path / "x.gguf")
    head = checkpoint.find("lm_head.weight")
    assert head is not None
    assert (head.dtype, head.shape, head.encoding, head.logical_shape) == ("U8", (64, 210), "Q6_K", (64, 256))
    assert stored(head) == written["output.weight"][2]
    assert checkpoint.shape("lm_head.weight") == (64, 256)
    stack = written["blk.1.ffn_up_exps.weight"][2]
    view = checkpoint.expert(1, 3)["up_proj.weight"]
    assert (view.dtype, view.shape, view.location.encoding) == ("U8", (64, 272), "Q8_0")
    assert bytes(view.data) == stack[3 * 64 * 272 : 4 * 64 * 272]
    assert checkpoint.unreadable() == []


def test_one_file_of_a_split_model_is_listed_alone(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", split_max_tensors=11)
    first, second = (manifests.open(tmp_path / f"x-0000{number}-of-00005.gguf") for number in (1, 2))
    assert "model.embed_tokens.weight" in first
    # Only the first file says what the names mean.
    assert any(location.name.startswith("blk.") for location in second.tensors())
    for part in (first, second):
        assert part.config == {}
        assert part.manifest.model.num_hidden_layers is None


def test_safetensors_and_manifests_come_first(v3_folder: Path, v3_resharded: Path, tmp_path: Path) -> None:
    for source in (v3_folder, v3_resharded):
        folder = shutil.copytree(source, tmp_path / source.parent.name / source.name)
        before = manifests.open(folder).manifest
        write_gguf(folder / "x.gguf")
        assert manifests.open(folder).manifest == before
    (folder / "manifest.json").unlink()
    (folder / "reshard-journal.jsonl").touch()
    with pytest.raises(ToolkitError, match="is not finished"):
        manifests.open(folder)


def test_files_that_are_not_one_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", split_max_tensors=30)
    one, two = sorted(tmp_path.iterdir())
    assert manifests.open(tmp_path)
    moved = two.rename(tmp_path / "elsewhere")
    with pytest.raises(SourceNotFoundError, match="1 of 2 files of a split model are missing, first a-00002-of-00002"):
        manifests.open(tmp_path)
    moved.rename(two)
    shutil.copy(one, tmp_path / "b-00001-of-00001.gguf")
    with pytest.raises(SourceNotFoundError, match=r"3 \.gguf files that are not one model"):
        manifests.open(tmp_path)
    (tmp_path / "b-00001-of-00001.gguf").rename(tmp_path / "a-00003-of-00002.gguf")
    with pytest.raises(SourceNotFoundError, match=r"3 \.gguf files that are not one model"):
        manifests.open(tmp_path)
    (tmp_path / "a-00003-of-00002.gguf").unlink()
    two.unlink()
    one.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ManifestError, match=r"is file 1 of 2 of a split model; give .* NAME-00001-of-00002\.gguf"):
        manifests.open(tmp_path)


@pytest.mark.parametrize("alone", [False, True], ids=["folder", "file"])
def test_a_link_out_of_the_folder_and_a_fifo(alone: bool, tmp_path: Path, deadline: None) -> None:
    write_gguf(tmp_path / "outside.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.gguf").symlink_to("../outside.gguf")
    with pytest.raises(ManifestError, match="leaves the folder"):
        # What a folder names is not even opened; of a file that somebody named himself no tensor is handed out.
        _ = list(manifests.open(folder / "x.gguf").tensors()) if alone else manifests.open(folder)
    (folder / "x.gguf").unlink()
    os.mkfifo(folder / "x.gguf")
    with pytest.raises(SourceNotFoundError):
        manifests.open(folder / "x.gguf" if alone else folder)


ARCH = [("general.architecture", STRING, "deepseek2")]


def split_keys(number: Any, count: Any, tensors: Any) -> list[tuple[str, int, Any]]:
    keys = [("split.no", U16, number), ("split.count", U16, count), ("split.tensors.count", I32, tensors)]
    return [key for key in keys if key[2] is not None]


def put(path: Path, pairs: list[Any], *tensors: tuple[str, list[int], int]) -> None:
    entries, end = place(list(tensors))
    path.write_bytes(header({"pairs": pairs, "tensors": entries}) + bytes(end))


SPLITS = {
    "right": ([split_keys(0, 2, 2), split_keys(1, 2, 2)], None),
    "no count": ([split_keys(0, None, 2), split_keys(1, 2, 2)], "has split.count None, which must be 2"),
    "no number": ([split_keys(0, 2, 2), split_keys(None, 2, 2)], "has split.no None, which must be 1"),
    "counts from 1": ([split_keys(1, 2, 2), split_keys(2, 2, 2)], "has split.no 1, which must be 0"),
    "swapped": ([split_keys(1, 2, 2), split_keys(0, 2, 2)], "has split.no 1, which must be 0"),
    "twice the same": ([split_keys(0, 2, 2), split_keys(0, 2, 2)], "has split.no 0, which must be 1"),
    "another count": ([split_keys(0, 3, 2), split_keys(1, 3, 2)], "has split.count 3, which must be 2"),
    "counts differ": ([split_keys(0, 2, 2), split_keys(1, 3, 2)], "has split.count 3, which must be 2"),
    "more tensors": ([split_keys(0, 2, 3), split_keys(1, 2, 3)], "has split.tensors.count 3, which must be 2"),
    "negative": ([split_keys(0, 2, -1), split_keys(1, 2, -1)], "has split.tensors.count -1, which must be 2"),
    "a text": ([[("split.count", STRING, "2")], split_keys(1, 2, 2)], "has split.no None"),
    "a list": ([[*split_keys(0, None, 2), ("split.count", ARRAY, (U16, [2]))], split_keys(1, 2, 2)], "(2,), which"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "says"), SPLITS.values(), ids=SPLITS.keys())
def test_the_parts_of_a_split_must_agree(keys: list[Any], says: str | None, tmp_path: Path) -> None:
    for number, (pairs, name) in enumerate(zip(keys, ("output.weight", "output_norm.weight"), strict=True), 1):
        put(tmp_path / f"x-0000{number}-of-00002.gguf", ARCH + pairs if number == 1 else pairs, (name, [8], 0))
    if says is None:
        assert {location.name for location in manifests.open(tmp_path).tensors()} == {
            "lm_head.weight",
            "model.norm.weight",
        }
        return
    with pytest.raises(ManifestError) as caught:
        manifests.open(tmp_path)
    assert says in str(caught.value)


def test_what_was_split_and_merged_again_is_whole(tmp_path: Path) -> None:
    """As llama-gguf-split leaves it: the keys of the first file, with a count of no files."""
    path = tmp_path / "x.gguf"
    put(path, ARCH + split_keys(0, 0, 1), ("output.weight", [8], 0))
    for named in (path, tmp_path):
        checkpoint = manifests.open(named)
        assert [location.name for location in checkpoint.tensors()] == ["lm_head.weight"]
        assert checkpoint.config["model_type"] == "deepseek_v2"
    path.rename(tmp_path / "x-00001-of-00001.gguf")
    assert manifests.open(tmp_path).config
    put(tmp_path / "x-00001-of-00001.gguf", ARCH + split_keys(0, 0, 2), ("output.weight", [8], 0))
    with pytest.raises(ManifestError, match=r"has split\.tensors\.count 2, which must be 1"):
        manifests.open(tmp_path)


def test_a_saved_header_with_bytes_of_nothing_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "x.gguf", ARCH, ("output.weight", [7], 0), ("output_norm.weight", [7], 0))
    (found,) = read_file(LocalFolder(tmp_path), "x.gguf").shards.values()
    whole = with_gaps(LocalFolder(tmp_path), "x.gguf", found)
    assert parse_saved({"x.gguf": (whole.rest, whole.file_bytes)}) == {"x.gguf": whole}
    size = len(whole.rest)
    with pytest.raises(ManifestError, match=f"has {size + 1} bytes, its file has {size} beside tensors"):
        parse_saved({"x.gguf": (whole.rest + b"x", whole.file_bytes)})


def test_what_is_refused_of_the_metadata_says_in_which_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    keys = [*ARCH, ("deepseek2.expert_count", STRING, "many"), ("tokenizer.ggml.model", STRING, "llama")]
    put(path, keys, ("output.weight", [8], 0))
    checkpoint = manifests.open(path)
    with pytest.raises(ManifestError, match=rf"^{re.escape(str(path))}: the GGUF metadata has deepseek2\.expert_count"):
        _ = checkpoint.config
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with pytest.raises(
            UnsupportedModelError, match=rf"^{re.escape(str(path))}: the GGUF metadata has tokenizer\.ggml"
        ):
            checkpoint.auxiliary.read(name, max_bytes=1000)


def test_names_are_there_once_in_the_whole_set(tmp_path: Path) -> None:
    for number in (0, 1):
        pairs = ARCH + split_keys(number, 2, 2)
        put(tmp_path / f"x-0000{number + 1}-of-00002.gguf", pairs, ("output.weight", [8], 0))
    with pytest.raises(ManifestError, match=r"two tensors are 'lm_head\.weight', one of them as 'output\.weight'"):
        manifests.open(tmp_path)
    path = tmp_path / "other" / "x.gguf"
    path.parent.mkdir()
    put(path, ARCH, ("output.weight", [8], 0), ("lm_head.weight", [8], 0))
    with pytest.raises(ManifestError, match="two tensors are"):
        manifests.open(path)
    expert = "model.layers.1.mlp.experts.1.up_proj.weight"
    put(path, ARCH, ("blk.1.ffn_up_exps.weight", [8, 2, 3], 0), (expert, [8], 0))
    with pytest.raises(ManifestError, match="two tensors are"):
        manifests.open(path)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("ffn_up_exps", [32, 4]),
        ("ffn_up_exps", [32]),
        ("ffn_up_exps", [32, 4, 2, 2]),
        ("ffn_up_exps", [1, 1, 10_001]),
        ("ffn_gate_up_exps", [32, 3, 2]),
    ],
)
def test_what_is_no_stack_of_experts(name: str, sizes: list[int], tmp_path: Path) -> None:
    put(tmp_path / "x.gguf", ARCH, (f"blk.1.{name}.weight", sizes, 24))
    with pytest.raises(ManifestError, match=r"it must be \[experts, rows"):
        manifests.open(tmp_path)


def test_a_file_of_more_experts_than_any_model(tmp_path: Path) -> None:
    put(tmp_path / "x.gguf", ARCH, *((f"blk.{layer}.ffn_up_exps.weight", [1, 1, 10_000], 24) for layer in range(51)))
    with pytest.raises(ManifestError, match="more than 500000 tensors"):
        manifests.open(tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "deepseek2-ocr", "", None, "\x1b[2J"])
def test_another_architecture_is_listed_under_its_own_names(
    architecture: str | None, tmp_path: Path, program: Program
) -> None:
    pairs = [] if architecture is None else [("general.architecture", STRING, architecture)]
    put(tmp_path / "x.gguf", [*pairs, ("llama.block_count", U32, 32)], ("blk.1.ffn_up_exps.weight", [32, 4, 2], 8))
    checkpoint = manifests.open(tmp_path)
    assert [location.name for location in checkpoint.tensors()] == ["blk.1.ffn_up_exps.weight"]
    assert checkpoint.config == {}
    for command in ("ls", "show", "check"):
        result = program("manifests", command, tmp_path)
        assert result.code == 0
        assert "\x1b" not in result.out
    assert (
        (architecture or "unknown model type") in program("manifests", "show", tmp_path).out
        or not architecture
        or (architecture == "\x1b[2J")
    )


def test_ls(program: Program, tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "x.gguf")
    rows = program("manifests", "ls", tmp_path / "x.gguf", "--json").json
    assert {row["name"] for row in rows} == expected(written).keys()
    row = next(row for row in rows if row["name"] == "model.layers.2.mlp.experts.4.gate_proj.weight")
    data = expected(written)[row["name"]][2]
    assert (tmp_path / "x.gguf").read_bytes()[row["begin"] : row["end"]] == data
    assert {key: row[key] for key in ("dtype", "shape", "encoding", "logical_shape", "file", "codec")} == {
        "dtype": "U8", "shape": [64, 144], "encoding": "Q4_K", "logical_shape": [64, 256], "file": "x.gguf",
        "codec": "none",
    }  # fmt: skip
    result = program("manifests", "ls", tmp_path, "--layer", 2, "--expert", 4)
    assert (result.code, result.err) == (0, "")
    lines = [line.split() for line in result.out.splitlines()]
    assert [line[:2] for line in lines] == [["Q5_1", "256x64"], ["Q4_K", "64x256"], ["Q8_0", "64x256"]]
    assert lines[1][2:] == [f"{row['begin']}-{row['end']}", "x.gguf", row["name"]]


def test_show_and_check(program: Program, tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "x.gguf", split_max_tensors=20)
    result = program("manifests", "show", tmp_path)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{tmp_path}: deepseek_v3, original files, in place\n")
    assert "5 experts of" in result.out
    document = program("manifests", "show", tmp_path, "--json").json
    assert document["parameters"]["main"] == sum(int(np.prod(shape)) for shape, _, _ in written.values())
    assert document["parameters"]["activated"] is not None
    kinds = {kind.name for _, kind, _ in written.values()}
    assert document["bytes_by_dtype"].keys() == document["tensors_by_dtype"].keys() == kinds
    assert sum(document["bytes_by_dtype"].values()) == sum(len(data) for _, _, data in written.values())
    assert program("manifests", "check", tmp_path).out == f"{tmp_path}: 3 files, sizes and headers are right\n"


@pytest.mark.parametrize("command", ["ls", "show", "check"])
def test_faults_end_with_their_exit_code(command: str, program: Program, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    for spoiled in (whole[:-1], whole[:5000], b"GGUF", b"", whole + b"\0"):
        (tmp_path / "x.gguf").write_bytes(spoiled)
        for path in (tmp_path, tmp_path / "x.gguf"):
            result = program("manifests", command, path)
            assert result.code == 12
            assert "x.gguf" in result.err + result.out
    (tmp_path / "x.gguf").rename(tmp_path / "x-00001-of-00002.gguf")
    result = program("manifests", command, tmp_path)
    assert (result.code, result.out) == (10, "")
    assert "1 of 2 files of a split model are missing" in result.err
