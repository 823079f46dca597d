"""A plan covers every byte exactly once, whatever the checkpoint looks like."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

import manifests
from manifests.dtypes import nbytes
from manifests.errors import ManifestError
from manifests.header import Header, HeaderTensor, encode_header, parse_header
from manifests.names import parse_name
from manifests.paths import parse_path, place_of
from manifests.schema import Selection
from manifests.summary import summarize
from reshard import plan as plan_module
from reshard.places import LocalPlace
from reshard.plan import PAGE_BYTES, Plan, SelectionError, make_plan
from reshard.source import SourceCheckpoint

FP8_NAMES = [
    f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
    for layer in (0, 3, 12)
    for expert in (0, 7, 10, 255)
    for projection in ("gate", "down")
]
OTHER_NAMES = [
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight",
    "model.layers.3.self_attn.o_proj.weight", "model.layers.12.embed_tokens.weight", "model.layers.12.enorm.weight",
    "model.layers.3.mlp.gate.e_score_correction_bias", "strange", "model.layers.7.strange.weight_scale_inv",
    "weight_scale_inv", "model.layers.0.mlp.experts.0.gate_proj.bias",
]  # fmt: skip


@st.composite
def sources(draw: st.DrawFn) -> SourceCheckpoint:
    """Any tensors in any order, cut into shards anywhere."""
    fp8 = draw(st.lists(st.sampled_from(FP8_NAMES), unique=True, max_size=8))
    tensors = [(name, "F8_E4M3") for name in fp8] + [(f"{name}_scale_inv", "F32") for name in fp8]
    others = draw(st.lists(st.sampled_from(OTHER_NAMES), unique=True, min_size=1, max_size=8))
    tensors = draw(st.permutations(tensors + [(name, draw(st.sampled_from(["BF16", "F32", "U8"]))) for name in others]))
    cuts = sorted(draw(st.sets(st.integers(1, len(tensors) - 1), max_size=5))) if len(tensors) > 1 else []
    shards: dict[str, Header] = {}
    for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(tensors)], strict=True)):
        entries, position = [], 0
        for name, dtype in tensors[begin:end]:
            shape = tuple(draw(st.lists(st.integers(0, 40), max_size=2)))
            size = nbytes(dtype, shape)
            entries.append(HeaderTensor(name=name, dtype=dtype, shape=shape, begin=position, end=position + size))
            position += size
        raw = encode_header(entries, align=draw(st.sampled_from([1, 8])))
        shards[f"{number}.safetensors"] = parse_header(raw, file_bytes=len(raw) + position, what="")
    return SourceCheckpoint(
        place=LocalPlace(Path("x")), shards=shards, index=None, config={}, auxiliary=(), left_out=()
    )


def check_files(plan: Plan) -> None:
    """Every output file is one that the library opens, in the order that FORMAT.md asks for."""
    assert [file.path for file in plan.files] == sorted({file.path for file in plan.files})
    for file in plan.files:
        assert len(file.header) % PAGE_BYTES == 0
        assert len(file.header) == file.header_size
        position = len(file.header)
        for tensor in file.tensors:
            assert (tensor.output_offset, tensor.size) == (position, nbytes(tensor.dtype, tensor.shape))
            position += tensor.size
        assert position == file.size
        parsed = parse_header(file.header, file_bytes=file.size, what="")
        assert {(t.name, t.dtype, t.shape, t.begin + len(file.header)) for t in parsed.tensors} == {
            (t.name, t.dtype, t.shape, t.output_offset) for t in file.tensors
        }
        read = safetensors.deserialize(file.header + bytes(file.size - len(file.header)))
        assert {name for name, _ in read} == {tensor.name for tensor in file.tensors}
        assert parse_path(file.path) == file.place
        assert all(place_of(parse_name(tensor.name)) == file.place for tensor in file.tensors)
        scales = [parse_name(tensor.name).is_scale for tensor in file.tensors]
        assert scales == sorted(scales)


@given(sources())
def test_every_source_byte_is_taken_exactly_once(source: SourceCheckpoint) -> None:
    plan = make_plan(source, Selection())
    check_files(plan)
    taken: dict[str, list[tuple[int, int]]] = {shard: [] for shard in source.shards}
    for file in plan.files:
        for tensor in file.tensors:
            taken[tensor.shard].append((tensor.source_offset, tensor.source_offset + tensor.size))
    for shard, header in source.shards.items():
        position = len(header.raw)
        for begin, end in sorted(taken[shard]):
            assert begin == position
            position = end
        assert position == header.file_bytes
    assert plan.payload_bytes == sum(header.file_bytes - len(header.raw) for header in source.shards.values())
    assert plan.output_bytes == sum(file.size for file in plan.files)
    assert plan.complete_shards == source.shards.keys()
    assert plan.left_out_tensors == 0
    names = {tensor.name for header in source.shards.values() for tensor in header.tensors}
    assert plan.unknown.keys() == {name for name in names if parse_name(name).role == "unknown"}


@given(sources(), st.data())
def test_what_a_shard_gives_is_listed_in_its_order(source: SourceCheckpoint, data: st.DataObject) -> None:
    layers = sorted({layer for h in source.shards.values() for t in h.tensors if (layer := parse_name(t.name).layer)})
    chosen = data.draw(st.none() | st.sets(st.sampled_from(layers))) if layers else None
    plan = make_plan(source, Selection(layers=None if chosen is None else tuple(sorted(chosen))))
    by_shard = plan.by_shard()
    assert list(by_shard) and all(by_shard.values()) if plan.files else not by_shard
    for file_number, file in enumerate(plan.files):
        assert {tensor.file for tensor in file.tensors} == {file_number}
    found = [tensor for tensors in by_shard.values() for tensor in tensors]
    assert {id(tensor) for tensor in found} == {id(tensor) for file in plan.files for tensor in file.tensors}
    assert len(found) == sum(len(file.tensors) for file in plan.files)
    for shard, header in source.shards.items():
        given = by_shard.get(shard, [])
        assert all(tensor.shard == shard for tensor in given)
        names = {tensor.name for tensor in given}
        # As they lie in the shard; which of several empty tensors at one offset is the first is nobody's matter.
        begins = {tensor.name: (tensor.begin, tensor.end) for tensor in header.tensors}
        assert [begins[tensor.name] for tensor in given] == [
            (t.begin, t.end) for t in header.tensors if t.name in names
        ]


def test_an_empty_tensor_comes_before_its_neighbour() -> None:
    header = header_of(("lm_head.weight", "BF16", 0), ("model.layers.0.input_layernorm.weight", "BF16", 4))
    plan = make_plan(source_of(header), Selection())
    names = [tensor.name for tensor in header.tensors]
    assert [tensor.name for tensor in plan.by_shard()["0.safetensors"]] == names
    assert [tensor.name for file in plan.files for tensor in file.tensors] == names[::-1]


def test_a_header_may_take_several_pages() -> None:
    names = [f"model.layers.0.strange.{number}" for number in range(100)]
    plan = make_plan(source_of(header_of(*((name, "BF16", 4) for name in names))), Selection())
    check_files(plan)
    assert plan.files[0].header_size > PAGE_BYTES


def test_a_header_that_no_reader_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard's own is within the limit, and all of them together are not."""
    source = source_of(*(header_of((f"model.layers.0.strange.{number}", "BF16", 4)) for number in range(100)))
    size = make_plan(source, Selection()).files[0].header_size
    monkeypatch.setattr(plan_module, "MAX_HEADER_BYTES", size - 8)
    make_plan(source, Selection())
    monkeypatch.setattr(plan_module, "MAX_HEADER_BYTES", size - 9)
    with pytest.raises(ManifestError, match=f"would hold 100 tensors, and their header of {size:,} bytes is over"):
        make_plan(source, Selection())


@given(sources(), st.data())
def test_within_a_file_source_order_is_kept(source: SourceCheckpoint, data: st.DataObject) -> None:
    order = {
        tensor.name: (number, tensor.begin, index)
        for number, header in enumerate(source.shards.values())
        for index, tensor in enumerate(header.tensors)
    }
    for file in make_plan(source, Selection()).files:
        for scale in (False, True):
            part = [order[t.name] for t in file.tensors if parse_name(t.name).is_scale is scale]
            assert part == sorted(part)


@given(sources(), st.data())
def test_a_selection_takes_exactly_what_it_names(source: SourceCheckpoint, data: st.DataObject) -> None:
    names = {t.name: (parse_name(t.name), shard) for shard, header in source.shards.items() for t in header.tensors}
    layers = sorted({name.layer for name, _ in names.values() if name.layer is not None})
    experts = sorted({name.expert for name, _ in names.values() if name.expert is not None})
    selection = Selection(
        layers=tuple(sorted(data.draw(st.sets(st.sampled_from(layers))))) if layers else None,
        experts=tuple(sorted(data.draw(st.sets(st.sampled_from(experts))))) if experts else None,
    )
    plan = make_plan(source, selection)
    check_files(plan)
    expected = {
        text
        for text, (name, _) in names.items()
        if (name.layer is None or selection.layers is None or name.layer in selection.layers)
        and (name.expert is None or selection.experts is None or name.expert in selection.experts)
    }
    assert {tensor.name for file in plan.files for tensor in file.tensors} == expected
    assert plan.left_out_tensors == len(names) - len(expected)
    whole = {s for s in source.shards if all(text in expected for text, (_, shard) in names.items() if shard == s)}
    assert plan.complete_shards == whole
    # Numbers in paths keep the whole model's width, so that parts fit together.
    widths = {len(file.path.split("/")[1]) for file in plan.files if file.place.layer is not None}
    assert len(widths) <= 1


def test_widths_follow_the_models_largest_numbers(v3_folder: Path, plan_of: Callable[..., Any]) -> None:
    _, plan = plan_of(v3_folder, Selection(layers=(1,), experts=(3,)))
    assert [file.path for file in plan.files] == [
        "layers/1/dense.safetensors", "layers/1/experts/03.safetensors", "model/dense.safetensors",
        "model/embed.safetensors", "model/head.safetensors",
    ]  # fmt: skip


def test_unknown_names_are_kept_and_named(v3_folder: Path, plan_of: Callable[..., Any]) -> None:
    _, plan = plan_of(v3_folder)
    assert plan.unknown == {
        "model.layers.1.self_attn.mystery.weight": "layers/1/dense.safetensors",
        "model.layers.2.gain": "layers/2/dense.safetensors",
        "vision_tower.proj.weight": "model/dense.safetensors",
    }


def test_the_mtp_layers_copies_have_files_of_their_own(v3_folder: Path, plan_of: Callable[..., Any]) -> None:
    _, plan = plan_of(v3_folder)
    tensors = {file.path: [tensor.name for tensor in file.tensors] for file in plan.files}
    assert tensors["layers/3/embed.safetensors"] == ["model.layers.3.embed_tokens.weight"]
    assert tensors["layers/3/head.safetensors"] == ["model.layers.3.shared_head.head.weight"]
    assert "model.layers.3.eh_proj.weight" in tensors["layers/3/dense.safetensors"]
    assert tensors["model/head.safetensors"] == ["model.norm.weight", "lm_head.weight"]


def test_a_plan_follows_from_its_source_alone(v3_folder: Path, plan_of: Callable[..., Any]) -> None:
    assert plan_of(v3_folder)[1] == plan_of(v3_folder)[1]


def header_of(*tensors: tuple[str, str, int]) -> Header:
    entries, position = {}, 0
    for name, dtype, size in tensors:
        entries[name] = {"dtype": dtype, "shape": [size], "data_offsets": [position, position + nbytes(dtype, [size])]}
        position += nbytes(dtype, [size])
    text = json.dumps(entries).encode()
    return parse_header(struct.pack("<Q", len(text)) + text, file_bytes=8 + len(text) + position, what="")


def source_of(*headers: Header) -> SourceCheckpoint:
    shards = {f"{number}.safetensors": header for number, header in enumerate(headers)}
    return SourceCheckpoint(
        place=LocalPlace(Path("x")), shards=shards, index=None, config={}, auxiliary=(), left_out=()
    )


def test_scales_may_lie_in_any_shard_but_must_lie_somewhere() -> None:
    weight = "model.layers.0.self_attn.o_proj.weight"
    alone, scale = header_of((weight, "F8_E4M3", 4)), header_of((f"{weight}_scale_inv", "F32", 1))
    assert make_plan(source_of(scale, alone), Selection()).files[0].tensors[0].name == weight
    with pytest.raises(ManifestError, match=r"o_proj\.weight' \(1 in all\) has no weight_scale_inv"):
        make_plan(source_of(alone), Selection())
    # Also where the selection leaves the weight out: the checkpoint is not whole.
    other = header_of(("model.layers.5.input_layernorm.weight", "BF16", 4))
    with pytest.raises(ManifestError, match="no weight_scale_inv"):
        make_plan(source_of(alone, other), Selection(layers=(5,)))


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        (Selection(layers=(1, 9)), "no layer 9"),
        (Selection(experts=(11,)), "no expert 11"),
        (Selection(layers=(61,)), "no layer"),
    ],
)
def test_a_selection_of_what_is_not_there(
    v3_folder: Path, plan_of: Callable[..., Any], selection: Selection, says: str
) -> None:
    with pytest.raises(SelectionError, match=says):
        plan_of(v3_folder, selection)


def test_a_shard_without_tensors_is_a_shard() -> None:
    plan = make_plan(source_of(header_of(), header_of(("lm_head.weight", "BF16", 4))), Selection())
    assert plan.complete_shards == {"0.safetensors", "1.safetensors"}
    assert len(plan.files) == 1


def test_weights_of_whole_pages_start_on_pages() -> None:
    names = [f"model.layers.3.mlp.experts.7.{p}_proj.weight" for p in ("gate", "up", "down")]
    tensors = [item for name in names for item in ((name, "F8_E4M3", 8192), (f"{name}_scale_inv", "F32", 3))]
    random.Random(0).shuffle(tensors)
    file = make_plan(source_of(header_of(*tensors)), Selection()).files[0]
    assert [tensor.output_offset % 4096 for tensor in file.tensors[:3]] == [0, 0, 0]


def test_the_real_names_of_a_real_checkpoint(v3_resharded: Path, v3_folder: Path) -> None:
    assert (
        summarize(manifests.open(v3_resharded).manifest).parameters
        == summarize(manifests.open(v3_folder).manifest).parameters
    )


def test_a_plan_of_many_files_is_small() -> None:
    """Headers are padded to a page, so those of a large model's files would be most of what its plan takes."""
    tensors = [
        (f"model.layers.3.mlp.experts.{expert}.{projection}_proj.weight", "BF16", 512)
        for expert in range(500)
        for projection in ("gate", "up", "down")
    ]
    source = source_of(header_of(*tensors))
    kept, peaks = [], []
    # Several times: the interpreter's own tables, such as that of interned texts, grow once in a while.
    for _ in range(3):
        tracemalloc.start()
        try:
            plan = make_plan(source, Selection())
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(plan.files) == 500
        kept.append(now / len(tensors))
        peaks.append(peak / len(tensors))
    assert min(kept) < 400
    assert min(peaks) < 500


def test_what_many_tensors_have_in_common_is_one_object() -> None:
    name = "model.layers.3.mlp.experts.{}.up_proj.weight"
    plan = make_plan(source_of(header_of(*((name.format(n), "BF16", 5000) for n in range(3)))), Selection())
    first, *others = [tensor for file in plan.files for tensor in file.tensors]
    for other in others:
        for key in ("dtype", "shape", "size", "output_offset", "shard"):
            assert getattr(other, key) is getattr(first, key), key
