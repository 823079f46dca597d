"""Counting, against the published figures of real models; comparing, against copies with one thing changed.

Inventories are made here from the models' known dimensions, name by name, without any byte of payload.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests import cli, inventory
from manifests.dtypes import nbytes
from manifests.header import Header, HeaderTensor, encode_header
from manifests.inventory import read_shards
from manifests.paths import Kind
from manifests.schema import FileEntry, Manifest, ModelFacts, Selection, TensorEntry
from manifests.summary import Summary, diff, summarize
from reshard.places import LocalPlace
from reshard.plan import make_plan
from reshard.source import SourceCheckpoint

Tensor = tuple[str, str, tuple[int, ...]]

V3: dict[str, Any] = {
    "hidden": 7168, "vocab": 129280, "dense": 18432, "moe": 2048, "shared": 2048, "experts": 256, "layers": 61,
    "first_moe": 3, "heads": 128, "q_rank": 1536, "fp8": True, "bias": True, "mtp": True, "buffer": False,
}  # fmt: skip
KIMI = V3 | {"vocab": 163840, "experts": 384, "first_moe": 1, "heads": 64, "mtp": False, "buffer": True}
V2_LITE = V3 | {
    "hidden": 2048, "vocab": 102400, "dense": 10944, "moe": 1408, "shared": 2816, "experts": 64, "layers": 27,
    "first_moe": 1, "heads": 16, "q_rank": None, "fp8": False, "bias": False, "mtp": False,
}  # fmt: skip
MOONLIGHT = V2_LITE | {"vocab": 163840, "dense": 11264, "bias": True}


def matrix(model: dict[str, Any], name: str, rows: int, columns: int) -> Iterator[Tensor]:
    if not model["fp8"]:
        yield f"{name}.weight", "BF16", (rows, columns)
        return
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def mlp(model: dict[str, Any], name: str, width: int) -> Iterator[Tensor]:
    yield from matrix(model, f"{name}.gate_proj", width, model["hidden"])
    yield from matrix(model, f"{name}.up_proj", width, model["hidden"])
    yield from matrix(model, f"{name}.down_proj", model["hidden"], width)


def layer(model: dict[str, Any], number: int) -> Iterator[Tensor]:
    """One layer in the published order."""
    prefix, hidden, heads = f"model.layers.{number}.", model["hidden"], model["heads"]
    attention = f"{prefix}self_attn."
    if model["q_rank"]:
        yield from matrix(model, f"{attention}q_a_proj", model["q_rank"], hidden)
        yield f"{attention}q_a_layernorm.weight", "BF16", (model["q_rank"],)
        yield from matrix(model, f"{attention}q_b_proj", heads * 192, model["q_rank"])
    else:
        yield from matrix(model, f"{attention}q_proj", heads * 192, hidden)
    yield from matrix(model, f"{attention}kv_a_proj_with_mqa", 576, hidden)
    yield f"{attention}kv_a_layernorm.weight", "BF16", (512,)
    yield from matrix(model, f"{attention}kv_b_proj", heads * 256, 512)
    yield from matrix(model, f"{attention}o_proj", hidden, heads * 128)
    if model["buffer"]:
        yield f"{attention}rotary_emb.inv_freq", "BF16", (56,)
    if number < model["first_moe"]:
        yield from mlp(model, f"{prefix}mlp", model["dense"])
    else:
        yield f"{prefix}mlp.gate.weight", "BF16", (model["experts"], hidden)
        if model["bias"]:
            yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", (model["experts"],)
        yield from mlp(model, f"{prefix}mlp.shared_experts", model["shared"])
        for expert in range(model["experts"]):
            yield from mlp(model, f"{prefix}mlp.experts.{expert}", model["moe"])
    yield f"{prefix}input_layernorm.weight", "BF16", (hidden,)
    yield f"{prefix}post_attention_layernorm.weight", "BF16", (hidden,)


def mtp_rest(model: dict[str, Any], number: int) -> Iterator[Tensor]:
    hidden, vocab = model["hidden"], model["vocab"]
    for name, shape in (
        ("enorm", (hidden,)), ("hnorm", (hidden,)), ("eh_proj", (hidden, 2 * hidden)),
        ("embed_tokens", (vocab, hidden)), ("shared_head.norm", (hidden,)), ("shared_head.head", (vocab, hidden)),
    ):  # fmt: skip
        yield f"model.layers.{number}.{name}.weight", "BF16", shape


def outside(model: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, final norm, head."""
    hidden, vocab = model["hidden"], model["vocab"]
    return (
        ("model.embed_tokens.weight", "BF16", (vocab, hidden)),
        ("model.norm.weight", "BF16", (hidden,)),
        ("lm_head.weight", "BF16", (vocab, hidden)),
    )


def whole(model: dict[str, Any]) -> list[Tensor]:
    tensors = list(outside(model))
    for number in range(model["layers"] + model["mtp"]):
        tensors += layer(model, number)
    return tensors + (list(mtp_rest(model, model["layers"])) if model["mtp"] else [])


def manifest_of(tensors: list[Tensor], **facts: Any) -> Manifest:
    entries = tuple(
        TensorEntry(
            name=name, dtype=dtype, shape=shape, offset=0, size=nbytes(dtype, shape), digest=None, logical_shape=shape,
            source_name=name,
        )
        for name, dtype, shape in tensors
    )  # fmt: skip
    file = FileEntry(
        path="x",
        kind=Kind.SHARD,
        size=0,
        unpacked_size=0,
        header_size=0,
        header_sha256=None,
        digest=None,
        tensors=entries,
    )
    return Manifest(layout="in_place", files=(file,), model=ModelFacts(**facts))


@pytest.fixture(scope="session")
def v3_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3's 163 shards as they are published, 689 GB of zeros that take no space: real headers, sparse rest."""
    # Pipeline stages; within one a shard is closed at 2^32 elements.
    stages = [(0, 7), (7, 15), (15, 23), (23, 31), (31, 39), (39, 47), (47, 54), (54, 62)]
    embedding, norm, head = outside(V3)
    shards: list[list[Tensor]] = []
    for first, end in stages:
        tensors = [embedding] if first == 0 else []
        for number in range(first, end):
            tensors += ([norm, head] if number == 61 else []) + list(layer(V3, number))
        tensors += list(mtp_rest(V3, 61)) if end == 62 else []
        shard: list[Tensor] = []
        elements = 0
        for tensor in tensors:
            shard.append(tensor)
            elements += prod(tensor[2])
            if elements >= 1 << 32:
                shards.append(shard)
                shard, elements = [], 0
        if shard:
            shards.append(shard)
    root = tmp_path_factory.mktemp("v3-sparse")
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file_name = f"model-{index:05d}-of-{len(shards):06d}.safetensors"
        entries, position = [], 0
        for name, dtype, shape in shard:
            end = position + nbytes(dtype, shape)
            entries.append(HeaderTensor(name=name, dtype=dtype, shape=shape, begin=position, end=end))
            position = end
            weight_map[name] = file_name
        header = encode_header(entries)
        (root / file_name).write_bytes(header)
        os.truncate(root / file_name, len(header) + position)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    facts = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "n_routed_experts": 256, "num_experts_per_tok": 8}
    (root / "config.json").write_text(json.dumps(facts))
    return root


@pytest.fixture(scope="session")
def v3_shards(v3_on_disk: Path) -> Mapping[str, Header]:
    """Its headers, read once for all tests: 92,000 entries."""
    return read_shards(v3_on_disk)


def test_deepseek_v3_from_its_shards(
    v3_on_disk: Path, v3_shards: Mapping[str, Header], program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the technical report, and what `show` prints."""
    assert len(v3_shards) == len(list(v3_on_disk.glob("*.safetensors"))) == 163
    monkeypatch.setattr(inventory, "read_shards", lambda _: v3_shards)
    seen: list[Summary] = []
    monkeypatch.setattr(cli, "summarize", lambda manifest: seen.append(summarize(manifest)) or seen[0])
    result = program("manifests", "show", v3_on_disk)
    assert result.code == 0
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert "671,026,419,200" in lines["main"]
    assert "11,610,068,224" in lines["MTP's"]
    assert "1,853,358,080 in copies" in lines["MTP's"]
    assert "37,552,282,624" in lines["activated"]
    assert "653,908,770,816   97.45% of main" in lines["routed"]
    assert lines["tensors"].split()[1] == "91,991"
    assert "665,345,458,176" in lines["routed_expert"]
    assert lines["0-2"].split()[1] == "dense"
    assert lines["3-60"].split()[1] == "MoE"
    assert "256 experts of 44.1 MB" in lines["3-60"]
    assert lines["61"].split()[1] == "MTP"
    assert "689 GB" in lines["files"]
    summary = seen[0]
    assert (summary.tensors, summary.tensor_bytes, summary.file_bytes) == (91_991, 688_574_839_360, 688_586_727_753)
    assert sum(summary.bytes_by_role.values()) == sum(summary.bytes_by_dtype.values()) == 688_574_839_360
    assert (summary.tensors_by_dtype["F8_E4M3"], summary.unknown, summary.partial) == (45_808, (), False)


def test_deepseek_v3s_plan(v3_on_disk: Path, v3_shards: Mapping[str, Header]) -> None:
    """Every expert is one run of 44,050,944 bytes whose three matrices start on pages."""
    source = SourceCheckpoint(
        place=LocalPlace(v3_on_disk), shards=v3_shards, index=b"", config={}, auxiliary=(), left_out=()
    )
    plan = make_plan(source, Selection())
    experts = [file for file in plan.files if file.place.expert is not None]
    assert (len(experts), len(plan.files), plan.payload_bytes) == (59 * 256, 59 * 256 + 62 + 4, 688_574_839_360)
    assert (plan.unknown, plan.left_out_tensors, len(plan.complete_shards)) == ({}, 0, 163)
    two_shards = 0
    for file in experts:
        assert file.size - len(file.header) == 44_050_944
        assert [tensor.output_offset % 4096 for tensor in file.tensors[:3]] == [0, 0, 0]
        assert [tensor.size for tensor in file.tensors] == [14_680_064] * 3 + [3_584] * 3
        two_shards += len({tensor.shard for tensor in file.tensors}) == 2
    assert two_shards == 153


@pytest.mark.parametrize(
    ("model", "selected", "main", "tensors"),
    [
        (V2_LITE, 6, 15_706_484_224, 5_291),
        (MOONLIGHT, 6, 15_960_110_208, None),
        (KIMI, 8, 1_026_408_232_448, 139_644),
    ],
    ids=["V2-Lite", "Moonlight", "Kimi-K2"],
)
def test_other_models(model: dict[str, Any], selected: int, main: int, tensors: int | None) -> None:
    inventory = whole(model)
    facts = {
        "num_hidden_layers": model["layers"],
        "n_routed_experts": model["experts"],
        "num_experts_per_tok": selected,
    }
    summary = summarize(manifest_of(inventory, **facts))
    assert summary.parameters.main == main
    assert summary.parameters.mtp == summary.parameters.mtp_copies == 0
    assert summary.unknown == ()
    if tensors is not None:
        assert summary.tensors == tensors
    # A slow count, name by name: what a token uses is everything but the experts that it does not select.
    used = 0
    for name, _, shape in inventory:
        if "inv_freq" in name or "scale_inv" in name or "correction_bias" in name:
            continue
        expert = int(name.split(".")[5]) if ".experts." in name else 0
        used += prod(shape) if expert < selected else 0
    assert summary.parameters.activated == used


def test_v2_lite_activates_what_is_published() -> None:
    facts = {"num_hidden_layers": 27, "n_routed_experts": 64, "num_experts_per_tok": 6}
    activated = summarize(manifest_of(whole(V2_LITE), **facts)).parameters.activated
    assert activated is not None
    assert round(activated / 1e9, 2) == 2.66


def test_what_the_config_does_not_say_is_not_guessed() -> None:
    tensors = [("model.layers.0.mlp.experts.0.up_proj.weight", "BF16", (3, 5)), ("lm_head.weight", "BF16", (2, 5))]
    facts = {"num_hidden_layers": 1, "n_routed_experts": 3, "num_experts_per_tok": 1}
    for key in facts:
        assert summarize(manifest_of(tensors, **facts | {key: None})).parameters.activated is None
    assert summarize(manifest_of(tensors, **facts | {"n_routed_experts": 0})).parameters.activated is None
    manifest = manifest_of(tensors, **facts)
    known = summarize(manifest).parameters
    assert (known.main, known.routed, known.activated) == (25, 15, 15)
    part = dataclasses.replace(manifest, selection=Selection(layers=(0,)))
    assert (summarize(part).parameters.activated, summarize(part).partial) == (None, True)
    assert summarize(manifest_of(tensors[1:], num_hidden_layers=1)).parameters.activated == 10
    # Without num_hidden_layers no layer is an MTP layer.
    mtp = [("model.layers.9.eh_proj.weight", "BF16", (4, 2))]
    assert summarize(manifest_of(mtp)).parameters.main == 8
    assert summarize(manifest_of(mtp, num_hidden_layers=9)).parameters.mtp == 8


def test_what_is_no_parameter() -> None:
    tensors = [
        ("model.layers.0.self_attn.o_proj.weight", "F8_E4M3", (3, 5)),
        ("model.layers.0.self_attn.o_proj.weight_scale_inv", "F32", (1, 1)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (32,)),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "F32", (7,)),
        ("strange", "F32", (2,)),
    ]
    summary = summarize(manifest_of(tensors, num_hidden_layers=1))
    assert (summary.parameters.main, summary.parameters.activated) == (15 + 7 + 2, 15 + 2)
    assert summary.unknown == ("strange",)
    assert summary.bytes_by_role == {"buffer": 128, "router": 28, "attention": 19, "unknown": 8}


@pytest.fixture
def stored(v3_resharded: Path) -> Manifest:
    return manifests.open(v3_resharded).manifest


def with_tensor(manifest: Manifest, file: int, tensor: int, **changes: Any) -> Manifest:
    """A copy with one tensor changed."""
    entry = manifest.files[file]
    tensors = list(entry.tensors)
    tensors[tensor] = dataclasses.replace(tensors[tensor], **changes)
    files = list(manifest.files)
    files[file] = dataclasses.replace(entry, tensors=tuple(tensors))
    return dataclasses.replace(manifest, files=tuple(files))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"digest": "0" * 64}, "digest"),
        ({"dtype": "F16"}, "dtype"),
        ({"shape": (1,)}, "shape"),
        ({"encoding": "q4_k"}, "encoding"),
    ],
)
def test_one_changed_tensor_is_the_one_difference(stored: Manifest, changes: dict[str, Any], kind: str) -> None:
    other = with_tensor(stored, 3, 0, **changes)
    found = diff(stored, other)
    assert [(d.kind, d.what, d.name) for d in found] == [(kind, "tensor", stored.files[3].tensors[0].name)]
    assert found[0].a != found[0].b
    assert [dataclasses.replace(d, a=d.b, b=d.a) for d in diff(other, stored)] == found


def test_where_bytes_lie_is_no_difference(stored: Manifest) -> None:
    merged = dataclasses.replace(stored, files=tuple(reversed(stored.files)), source=None)
    assert diff(stored, merged) == diff(stored, stored) == []


def test_missing_parts_are_differences(stored: Manifest) -> None:
    less = dataclasses.replace(stored, files=stored.files[1:], documents=stored.documents[1:])
    gone = {("only_in_a", "tensor", tensor.name) for tensor in stored.files[0].tensors}
    gone |= {("only_in_a", "document", document.path) for document in stored.documents[:1]}
    assert {(d.kind, d.what, d.name) for d in diff(stored, less)} == gone
    assert all(d.kind == "only_in_b" for d in diff(less, stored))


def test_an_edited_auxiliary_file_is_a_difference_and_our_index_is_not(stored: Manifest) -> None:
    def with_document(path: str) -> Manifest:
        return dataclasses.replace(
            stored,
            documents=tuple(dataclasses.replace(d, sha256="0" * 64) if d.path == path else d for d in stored.documents),
        )

    assert [(d.kind, d.name) for d in diff(stored, with_document("config.json"))] == [("digest", "config.json")]
    assert diff(stored, with_document("model.safetensors.index.json")) == []


def test_a_plain_folder_is_compared_as_far_as_it_can_be(stored: Manifest, v3_folder: Path, v2_folder: Path) -> None:
    """It has no digests, and knows nothing of auxiliary files: neither is a difference."""
    plain = manifests.open(v3_folder).manifest
    for found in (diff(stored, plain), diff(plain, stored), diff(plain, plain)):
        assert {d.kind for d in found} == {"undecided"}
        assert len(found) == sum(len(file.tensors) for file in stored.files)
    shape = [d for d in diff(with_tensor(stored, 3, 0, shape=(1,)), plain) if d.kind != "undecided"]
    assert [(d.kind, d.name) for d in shape] == [("shape", stored.files[3].tensors[0].name)]
    assert {d.kind for d in diff(plain, manifests.open(v2_folder).manifest)} > {"only_in_a", "only_in_b"}


def test_copies_are_told_apart_without_their_payload(
    v3_resharded: Path,
    v3_copy: Path,
    tmp_path: Path,
    reshard_folder: Callable[..., Path],
    program: Callable[..., Any],
) -> None:
    """Of another model in the same form; of each copy the manifest alone is left."""
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensor = manifests.open(v3_copy).find(name)
    assert tensor is not None
    with Path(tensor.place).open("r+b") as file:
        file.seek(tensor.offset + tensor.size - 1)
        last = file.read(1)[0]
        file.seek(tensor.offset + tensor.size - 1)
        file.write(bytes([last ^ 1]))
    (v3_copy / "LICENSE").write_text("another")
    for other, path in ((reshard_folder(v3_copy, tmp_path / "resharded"), "a"), (v3_resharded, "b")):
        (tmp_path / path).mkdir()
        (tmp_path / path / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    result = program("manifests", "diff", tmp_path / "a", tmp_path / "b")
    assert (result.code, result.err) == (1, "different: 1 tensor not equal, 1 document not equal\n")
    assert result.out == f"tensor {name}: bytes differ\ndocument LICENSE: bytes differ\n"
    # Shards have no digests to tell them apart by: nothing is said of their bytes but that.
    result = program("manifests", "diff", v3_copy, tmp_path / "b")
    count = sum(len(entry.tensors) for entry in manifests.load(tmp_path / "b").files)
    said = f"{count} tensors agree in dtype and shape; their bytes have no digests to compare\n"
    assert (result.code, result.out, result.err) == (3, "", said)
