"""The path rule: from integers to paths and back, and which file a tensor goes to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.names import parse_name
from manifests.paths import Kind, Place, Widths, format_path, parse_path, place_of
from manifests.safety import relative_fault

_NUMBERS = st.integers(0, 9999)
_PLACES = st.one_of(
    st.builds(Place, st.none(), st.sampled_from([Kind.EMBED, Kind.HEAD, Kind.DENSE])),
    st.builds(Place, _NUMBERS, st.sampled_from([Kind.EMBED, Kind.HEAD, Kind.DENSE])),
    st.builds(Place, _NUMBERS, st.just(Kind.EXPERT), _NUMBERS),
)


@given(_PLACES, _NUMBERS, _NUMBERS)
def test_a_path_leads_back_to_its_place(place: Place, max_layer: int, max_expert: int) -> None:
    path = format_path(place, Widths.for_numbers(max_layer, max_expert))
    assert parse_path(path) == place
    assert relative_fault(path) is None


@given(_NUMBERS, st.data())
def test_paths_of_one_model_sort_as_numbers_do(largest: int, data: st.DataObject) -> None:
    a, b = data.draw(st.integers(0, largest)), data.draw(st.integers(0, largest))
    widths = Widths.for_numbers(largest, largest)
    assert (a < b) == (format_path(Place(a, Kind.EXPERT, a), widths) < format_path(Place(b, Kind.EXPERT, b), widths))


def test_deepseek_v3s_paths() -> None:
    widths = Widths.for_numbers(61, 255)
    assert format_path(Place(3, Kind.EXPERT, 7), widths) == "layers/03/experts/007.safetensors"
    assert format_path(Place(61, Kind.HEAD), widths) == "layers/61/head.safetensors"
    assert format_path(Place(None, Kind.EMBED), widths) == "model/embed.safetensors"
    assert format_path(Place(0, Kind.DENSE), Widths.for_numbers(9, 9)) == "layers/0/dense.safetensors"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "model/experts.safetensors",
        "model/shard.safetensors",
        "layers/03/shard.safetensors",
        "layers/x/dense.safetensors",
        "layers/-3/dense.safetensors",
        "layers/00003/dense.safetensors",
        "layers/\u0663/dense.safetensors",
        "layers/03/experts/.safetensors",
        "layers/03/experts/0/0.safetensors",
        "/layers/03/dense.safetensors",
        "./layers/03/dense.safetensors",
        "../layers/03/dense.safetensors",
        "layers/03/dense.safetensors\n",
        "layers/03/dense.safetensors.partial",
        "layers/03/denseXsafetensors",
        "Layers/03/dense.safetensors",
    ],
)
def test_other_paths_have_no_place(path: str) -> None:
    assert parse_path(path) is None


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", Place(None, Kind.EMBED)),
        ("model.norm.weight", Place(None, Kind.HEAD)),
        ("lm_head.weight", Place(None, Kind.HEAD)),
        ("model.layers.3.mlp.experts.17.up_proj.weight_scale_inv", Place(3, Kind.EXPERT, 17)),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", Place(3, Kind.DENSE)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", Place(3, Kind.DENSE)),
        ("model.layers.61.embed_tokens.weight", Place(61, Kind.EMBED)),
        ("model.layers.61.shared_head.head.weight", Place(61, Kind.HEAD)),
        ("model.layers.61.shared_head.norm.weight", Place(61, Kind.DENSE)),
        ("model.layers.5.never.heard.of.it", Place(5, Kind.DENSE)),
        ("../../etc/passwd", Place(None, Kind.DENSE)),
        ("model.layers.5./../../x", Place(5, Kind.DENSE)),
    ],
)
def test_where_a_tensor_goes(name: str, place: Place) -> None:
    assert place_of(parse_name(name)) == place
