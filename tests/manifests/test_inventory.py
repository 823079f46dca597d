"""Any checkpoint as tensors with locations: what is found is checked against the bytes that were written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors

import manifests
from manifests.config import model_facts
from manifests.errors import IntegrityError, ManifestError, SourceNotFoundError, UnsupportedModelError
from manifests.inventory import read_shards
from manifests.names import Role, parse_name
from manifests.validate import parse

INDEX = "model.safetensors.index.json"


def stored(location: manifests.Location) -> bytes:
    with Path(location.place).open("rb") as file:
        file.seek(location.offset)
        return file.read(location.size)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_bytes())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_plain_folder_and_its_resharded_twin_hold_the_same_bytes(
    v3_folder: Path, v3_resharded: Path, v3_bytes: dict[str, bytes]
) -> None:
    for root in (v3_folder, v3_resharded):
        checkpoint = manifests.open(root)
        assert {location.name for location in checkpoint.tensors()} == v3_bytes.keys()
        for name, data in v3_bytes.items():
            location = checkpoint.find(name)
            assert location is not None
            assert name in checkpoint
            assert stored(location) == data
            assert location.place == str(root / location.file)
    assert manifests.open(v3_resharded).manifest.layout == "resharded"
    assert manifests.open(v3_folder).manifest.layout == "in_place"


def test_every_shard_agrees_with_the_library(v3_folder: Path, kimi_folder: Path) -> None:
    for root in (v3_folder, kimi_folder):
        checkpoint = manifests.open(root)
        for file in checkpoint.manifest.files:
            theirs = {
                name: (tuple(info["shape"]), bytes(info["data"]))
                for name, info in safetensors.deserialize((root / file.path).read_bytes())
            }
            ours = {}
            for tensor in file.tensors:
                location = checkpoint.find(tensor.name)
                assert location is not None
                ours[tensor.name] = (tensor.shape, stored(location))
            assert ours == theirs


def test_the_fixture_is_as_hostile_as_the_real_thing(v3_folder: Path) -> None:
    """Weights are cut from their scales, experts from themselves, and payloads start at odd bytes."""
    checkpoint = manifests.open(v3_folder)
    where = {location.name: location.file for location in checkpoint.tensors()}
    pairs = [name for name in where if f"{name}_scale_inv" in where]
    assert sum(where[name] != where[f"{name}_scale_inv"] for name in pairs) >= 10
    experts: dict[tuple[int | None, int], set[str]] = {}
    for name, shard in where.items():
        parsed = parse_name(name)
        if parsed.expert is not None:
            experts.setdefault((parsed.layer, parsed.expert), set()).add(shard)
    assert sum(len(shards) > 1 for shards in experts.values()) >= 10
    assert any(file.header_size % 2 for file in checkpoint.manifest.files)
    assert any(location.size == 0 for location in checkpoint.tensors())
    assert any(location.shape == () for location in checkpoint.tensors())
    assert sum(parse_name(name).role is Role.UNKNOWN for name in where) == 3


def test_experts_and_layers(v3_resharded: Path, v3_folder: Path, v3_bytes: dict[str, bytes]) -> None:
    for root in (v3_folder, v3_resharded):
        checkpoint = manifests.open(root)
        assert checkpoint.layers == (0, 1, 2, 3)
        assert checkpoint.experts(0) == ()
        assert checkpoint.experts(2) == tuple(range(11))
        views = checkpoint.expert(2, 10)
        assert views.keys() == {
            f"{p}_proj.{part}" for p in ("gate", "up", "down") for part in ("weight", "weight_scale_inv")
        }
        for short, view in views.items():
            assert bytes(view.data) == v3_bytes[f"model.layers.2.mlp.experts.10.{short}"]
            assert view.data.readonly
        assert views["gate_proj.weight"].shape == (40, 136)
        assert views["gate_proj.weight"].dtype == "F8_E4M3"
        assert "gate_proj.weight" in repr(views["gate_proj.weight"])
        dense = checkpoint.dense(1)
        assert {"self_attn.q_a_proj.weight", "mlp.gate.weight", "self_attn.mystery.weight"} < dense.keys()
        assert not any("mlp.experts." in name for name in dense)
        assert bytes(dense["mlp.gate.bias"].data) == b""
        for layer, expert in ((0, 0), (2, 11), (4, 0), (-1, 0)):
            with pytest.raises(SourceNotFoundError, match=f"no expert {expert} in layer {layer}"):
                checkpoint.expert(layer, expert)
        with pytest.raises(SourceNotFoundError, match="no layer 4"):
            checkpoint.dense(4)
        assert checkpoint.find("model.layers.2.mlp.experts.11.up_proj.weight") is None
        assert "nothing" not in checkpoint
        assert checkpoint.missing_scales() == []
        assert checkpoint.config["num_hidden_layers"] == 3


def test_kimis_shards_are_in_numeric_order(kimi_folder: Path) -> None:
    shards = list(read_shards(kimi_folder))
    assert shards == [f"model-{number}-of-61.safetensors" for number in range(1, 62)]


def test_shards_of_equal_number_have_an_order_too(tmp_path: Path) -> None:
    """Sets of names are iterated in another order in every process; the order of shards must not follow it."""
    expected = [f"m{'0' * zeros}{number}.safetensors" for number in range(1, 6) for zeros in range(4)]
    weight_map = {}
    for name in expected:
        header = json.dumps({f"t.{name}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header)
        weight_map[f"t.{name}"] = name
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert list(read_shards(tmp_path)) == sorted(expected, key=lambda name: (int(name[1:].split(".")[0]), name))


def test_one_file(single_folder: Path, v3_bytes: dict[str, bytes], tmp_path: Path) -> None:
    assert manifests.open(single_folder).manifest.model.num_hidden_layers == 1
    checkpoint = manifests.open(single_folder / "model.safetensors")
    view = checkpoint.dense(0)["self_attn.o_proj.weight"]
    assert bytes(view.data) == v3_bytes["model.layers.0.self_attn.o_proj.weight"]
    shutil.copy(single_folder / "config.json", tmp_path / "model.bin")
    with pytest.raises(SourceNotFoundError, match=r"not a \.safetensors or \.gguf file"):
        manifests.open(tmp_path / "model.bin")
    with pytest.raises(SourceNotFoundError, match="no such file or folder"):
        manifests.open(tmp_path / "absent")
    with pytest.raises(SourceNotFoundError, match=r"no manifest\.json"):
        manifests.open(tmp_path)
    for name in "ab":
        shutil.copy(single_folder / "model.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(SourceNotFoundError, match=r"2 \.safetensors files but no"):
        manifests.open(tmp_path)


def test_a_fifo_does_not_hang(tmp_path: Path, v3_copy: Path, deadline: None) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(SourceNotFoundError):
        manifests.open(tmp_path / "x.safetensors")
    shard = next(v3_copy.glob("model-00002-*"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(SourceNotFoundError):
        manifests.open(v3_copy)
    for name in (INDEX, "config.json"):
        (v3_copy / name).unlink()
        os.mkfifo(v3_copy / name)
        with pytest.raises(SourceNotFoundError):
            manifests.open(v3_copy)


def test_the_hub_caches_layout_works(v3_folder: Path, tmp_path: Path, v3_bytes: dict[str, bytes]) -> None:
    """Every file of a snapshot is a link into blobs, which is how `hf download` leaves a checkpoint."""
    repository = tmp_path / "models--deepseek-ai--DeepSeek-V3"
    snapshot = repository / "snapshots" / "e815299b"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(v3_folder.iterdir())):
        if path.is_file():
            shutil.copy(path, repository / "blobs" / f"{number:064x}")
            (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    checkpoint = manifests.open(snapshot)
    for short, view in checkpoint.expert(1, 3).items():
        assert bytes(view.data) == v3_bytes[f"model.layers.1.mlp.experts.3.{short}"]
    shard = next(snapshot.glob("model-00003-*"))
    target = shard.readlink().name
    shard.unlink()
    shutil.move(repository / "blobs" / target, tmp_path / "elsewhere")
    shard.symlink_to("../../../elsewhere")
    with pytest.raises(ManifestError, match="leaves the folder"):
        manifests.open(snapshot)


def test_what_an_index_may_not_say(v3_copy: Path) -> None:
    good = (v3_copy / INDEX).read_bytes()
    name = "model.norm.weight"
    shard = json.loads(good)["weight_map"][name]
    bad: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
        "a tensor no shard has": (lambda m: m.update(ghost=shard), ManifestError, "'ghost' is in"),
        "a tensor of a shard is not named": (lambda m: m.pop(name), ManifestError, "which the index does not name"),
        "a tensor in another shard": (
            lambda m: m.update({name: m["model.embed_tokens.weight"]}),
            ManifestError,
            "which the index says is in",
        ),
        "a shard that is not there": (lambda m: m.update({name: "x.safetensors"}), SourceNotFoundError, "1 of"),
        "a file of another kind": (lambda m: m.update({name: "config.json"}), ManifestError, "not a .safetensors file"),
        "a number": (lambda m: m.update({name: 3}), ManifestError, "not a .safetensors file"),
        "a list": (lambda m: m.update({name: [shard]}), ManifestError, "not a .safetensors file"),
        "null": (lambda m: m.update({name: None}), ManifestError, "not a .safetensors file"),
        "nothing": (lambda m: m.clear(), ManifestError, "no weight_map"),
        "a name with a superscript two": (
            lambda m: m.update({name: "\u00b21.safetensors"}), SourceNotFoundError, "1 of"),
        "a name no file system takes": (
            lambda m: m.update({name: "x" * 500 + ".safetensors"}), SourceNotFoundError, "1 of"),
    }  # fmt: skip
    for what, (spoil, error, says) in bad.items():
        (v3_copy / INDEX).write_bytes(good)
        edit_index(v3_copy, spoil)
        with pytest.raises(error) as caught:
            manifests.open(v3_copy)
        assert says in str(caught.value), what
    for raw, says in ((b"[]", "no weight_map"), (b'{"weight_map": []}', "no weight_map"), (b"\xff", "not UTF-8")):
        (v3_copy / INDEX).write_bytes(raw)
        with pytest.raises(ManifestError, match=says):
            manifests.open(v3_copy)


def test_contradictions_of_index_and_shards_are_all_carried(v3_copy: Path) -> None:
    edit_index(v3_copy, lambda m: [m.pop("lm_head.weight"), m.update(ghost=m["model.norm.weight"])])
    with pytest.raises(ManifestError, match="and 1 more problems") as caught:
        manifests.open(v3_copy)
    assert len(caught.value.problems) == 2
    assert {problem.kind for problem in caught.value.problems} == {"inconsistent"}


@pytest.mark.parametrize("raw", [b"[]", b"3", b'"x"', b"", b"{", b'{"a":1,"a":2}', b"\xff"])
def test_a_config_that_is_no_object(v3_copy: Path, raw: bytes) -> None:
    (v3_copy / "config.json").write_bytes(raw)
    with pytest.raises(ManifestError, match=r"config\.json"):
        manifests.open(v3_copy)


def test_facts_are_taken_only_where_they_can_be_facts() -> None:
    assert model_facts({}).num_hidden_layers is None
    for value in (-1, True, 3.0, "3", None, [3], 1 << 70):
        assert model_facts({"num_hidden_layers": value}).num_hidden_layers is None
    assert model_facts({"num_hidden_layers": 0}).num_hidden_layers == 0
    for kind in ("", 3, None, "x" * 101):
        assert model_facts({"model_type": kind}).model_type is None


def test_a_view_of_a_file_that_was_cut_is_not_handed_out_short(resharded_copy: Path) -> None:
    view = manifests.open(resharded_copy).expert(1, 0)["down_proj.weight"]
    os.truncate(Path(view.location.place), view.location.offset + 10)
    with pytest.raises(IntegrityError, match="bytes, expected"):
        _ = view.data


def test_views_keep_no_file_open(v3_resharded: Path, v3_bytes: dict[str, bytes]) -> None:
    """A process that looks at every expert of a large model would run out of descriptors."""
    checkpoint = manifests.open(v3_resharded)
    before = len(os.listdir("/proc/self/fd"))
    kept = [
        view.data for layer in (1, 2, 3) for expert in range(11) for view in checkpoint.expert(layer, expert).values()
    ]
    assert len(os.listdir("/proc/self/fd")) == before
    assert sum(map(len, kept)) == sum(len(data) for name, data in v3_bytes.items() if ".experts." in name)


@pytest.mark.parametrize("how", ["codec", "encoding"])
def test_what_only_other_tools_read_is_refused_and_not_misread(good: dict[str, Any], how: str, tmp_path: Path) -> None:
    """FORMAT.md has compressed files and quantised blocks from version 1 on; nobody may take them for weights."""
    manifests.save(parse(good), tmp_path)
    for file in good["files"]:
        path = tmp_path / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, file["size"])
    checkpoint = manifests.open(tmp_path)
    assert len(checkpoint.unreadable()) == 2
    name = good["files"][2 if how == "codec" else 0]["tensors"][0]["name"]
    says = "stored compressed" if how == "codec" else "encoded as q8_0"
    with pytest.raises(UnsupportedModelError, match=says):
        checkpoint.find(name)
    with pytest.raises(UnsupportedModelError, match=says):
        checkpoint.expert(3, 8) if how == "codec" else checkpoint.dense(3)
    assert checkpoint.find("lm_head.weight") is not None
    assert checkpoint.expert(3, 7)
    assert len(list(checkpoint.tensors())) == 6


def test_a_file_that_is_gone_is_named_when_it_is_asked_for(resharded_copy: Path) -> None:
    (resharded_copy / "layers" / "1" / "experts" / "04.safetensors").unlink()
    checkpoint = manifests.open(resharded_copy)
    assert checkpoint.expert(1, 3)
    with pytest.raises(SourceNotFoundError, match="layers/1/experts/04"):
        checkpoint.expert(1, 4)


def test_a_file_of_the_manifest_may_not_be_a_link_that_leaves(resharded_copy: Path, tmp_path: Path) -> None:
    path = resharded_copy / "layers" / "1" / "experts" / "04.safetensors"
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ManifestError, match="leaves the folder"):
        manifests.open(resharded_copy).expert(1, 4)
