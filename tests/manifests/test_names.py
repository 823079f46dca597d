"""The grammar of tensor names: what is known, what is nearly known, and that nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from manifests.names import Role, expert_prefix, find_missing_scales, parse_name

KNOWN = [
    ("model.embed_tokens.weight", None, Role.EMBEDDING, None, "embed_tokens", "weight"),
    ("model.norm.weight", None, Role.FINAL_NORM, None, "norm", "weight"),
    ("lm_head.weight", None, Role.LM_HEAD, None, "lm_head", "weight"),
    ("model.layers.0.self_attn.q_a_proj.weight", 0, Role.ATTENTION, None, "q_a_proj", "weight"),
    ("model.layers.0.self_attn.q_proj.weight", 0, Role.ATTENTION, None, "q_proj", "weight"),
    ("model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv", 60, Role.ATTENTION, None,
     "kv_a_proj_with_mqa", "weight_scale_inv"),
    ("model.layers.7.self_attn.q_a_layernorm.weight", 7, Role.ATTENTION, None, "q_a_layernorm", "weight"),
    ("model.layers.7.self_attn.indexer.k_norm.bias", 7, Role.ATTENTION, None, "indexer.k_norm", "bias"),
    ("model.layers.7.self_attn.rotary_emb.inv_freq", 7, Role.BUFFER, None, "rotary_emb", "inv_freq"),
    ("model.layers.2.input_layernorm.weight", 2, Role.NORM, None, "input_layernorm", "weight"),
    ("model.layers.2.mlp.down_proj.weight", 2, Role.DENSE_MLP, None, "down_proj", "weight"),
    ("model.layers.3.mlp.gate.weight", 3, Role.ROUTER, None, "gate", "weight"),
    ("model.layers.3.mlp.gate.e_score_correction_bias", 3, Role.ROUTER, None, "gate", "e_score_correction_bias"),
    ("model.layers.3.mlp.shared_experts.up_proj.weight", 3, Role.SHARED_EXPERT, None, "up_proj", "weight"),
    ("model.layers.3.mlp.experts.255.gate_proj.weight_scale_inv", 3, Role.ROUTED_EXPERT, 255, "gate_proj",
     "weight_scale_inv"),
    ("model.layers.9999.mlp.experts.9999.up_proj.weight", 9999, Role.ROUTED_EXPERT, 9999, "up_proj", "weight"),
    ("model.layers.61.eh_proj.weight", 61, Role.MTP, None, "eh_proj", "weight"),
    ("model.layers.61.shared_head.norm.weight", 61, Role.MTP, None, "shared_head.norm", "weight"),
    ("model.layers.61.shared_head.head.weight", 61, Role.MTP_HEAD, None, "shared_head.head", "weight"),
    ("model.layers.61.embed_tokens.weight", 61, Role.MTP_EMBEDDING, None, "embed_tokens", "weight"),
]  # fmt: skip

NEARLY = [
    "",
    ".",
    "model",
    "model.layers.3",
    "model.layers.3.",
    "model.layers..mlp.gate.weight",
    "model.layers.03.mlp.gate.weight",
    "model.layers.-3.mlp.gate.weight",
    "model.layers.+3.mlp.gate.weight",
    "model.layers.3 .mlp.gate.weight",
    "model.layers.10000.mlp.gate.weight",
    "model.layers.\u0663.mlp.gate.weight",  # ARABIC-INDIC DIGIT THREE, which int() would take
    "model.layers.3_0.mlp.gate.weight",
    "model.layers.3.mlp.experts.00.gate_proj.weight",
    "model.layers.3.mlp.experts.10000.gate_proj.weight",
    "model.layers.3.mlp.experts.gate_proj.weight",
    "model.layers.3.mlp.experts.1.gate_proj.weight\n",
    "\nmodel.layers.3.mlp.experts.1.gate_proj.weight",
    "model.layers.3.mlp.experts.1.gate_proj.weight.0",
    "model.layers.3.mlp.experts.1.gate_proj",
    "model.layers.3.mlp.experts.1.gate_proj.Weight",
    "model.layers.3.mlp.experts.1.w1.weight",
    "model.layers.3.block_sparse_moe.experts.1.w1.weight",
    "model.layers.3.mlp.experts.gate_up_proj",
    "xmodel.embed_tokens.weight",
    "model.lm_head.weight",
    "model.layers.3.lm_head.weight",
    "transformer.model.layers.3.mlp.gate.weight",
    "__metadata__",
]

_FORMS = {
    Role.EMBEDDING: "model.{p.projection}.{p.part}",
    Role.FINAL_NORM: "model.{p.projection}.{p.part}",
    Role.LM_HEAD: "{p.projection}.{p.part}",
    Role.ROUTED_EXPERT: "model.layers.{p.layer}.mlp.experts.{p.expert}.{p.projection}.{p.part}",
    Role.SHARED_EXPERT: "model.layers.{p.layer}.mlp.shared_experts.{p.projection}.{p.part}",
    Role.DENSE_MLP: "model.layers.{p.layer}.mlp.{p.projection}.{p.part}",
    Role.ROUTER: "model.layers.{p.layer}.mlp.{p.projection}.{p.part}",
    Role.ATTENTION: "model.layers.{p.layer}.self_attn.{p.projection}.{p.part}",
    Role.BUFFER: "model.layers.{p.layer}.self_attn.{p.projection}.{p.part}",
}
"""How a name is put together again from its parts; every other role of a layer stands directly in it."""


def rebuild(name: str) -> str:
    parsed = parse_name(name)
    return _FORMS.get(parsed.role, "model.layers.{p.layer}.{p.projection}.{p.part}").format(p=parsed)


@pytest.mark.parametrize(("text", "layer", "role", "expert", "projection", "part"), KNOWN, ids=[k[0] for k in KNOWN])
def test_known_names(text: str, layer: int | None, role: Role, expert: int | None, projection: str, part: str) -> None:
    name = parse_name(text)
    assert (name.layer, name.role, name.expert, name.projection, name.part) == (layer, role, expert, projection, part)
    assert rebuild(text) == name.text == text


@pytest.mark.parametrize("text", NEARLY)
def test_nearly_known_names_are_unknown_and_kept(text: str) -> None:
    name = parse_name(text)
    assert name.role is Role.UNKNOWN
    assert name.expert is None
    assert name.text == text


def test_an_unknown_name_keeps_its_layer() -> None:
    assert parse_name("model.layers.12.self_attn.mystery.weight").layer == 12
    assert parse_name("model.layers.12.a\nb").layer == 12
    assert parse_name("vision.layers.12.weight").layer is None


_PIECE = st.sampled_from(
    [
        "model",
        "layers",
        "self_attn",
        "mlp",
        "experts",
        "shared_experts",
        "gate",
        "gate_proj",
        "up_proj",
        "down_proj",
        "q_proj",
        "o_proj",
        "embed_tokens",
        "norm",
        "lm_head",
        "weight",
        "bias",
        "weight_scale_inv",
        "e_score_correction_bias",
        "input_layernorm",
        "enorm",
        "shared_head",
        "head",
        "0",
        "3",
        "07",
        "61",
        "99999",
        "rotary_emb",
        "inv_freq",
        "indexer",
        "wk",
    ]
)


@given(st.one_of(st.text(), st.lists(_PIECE, max_size=8).map(".".join), st.sampled_from([k[0] for k in KNOWN])))
@example("model.layers.1.embed_tokens.bias")
def test_any_text_parses_and_a_known_one_is_rebuilt_from_its_parts(text: str) -> None:
    name = parse_name(text)
    assert name.text == text
    if name.role is not Role.UNKNOWN:
        assert rebuild(text) == text


@given(st.integers(0, 9999), st.integers(0, 9999), st.sampled_from(["gate", "up", "down"]), st.booleans())
def test_every_expert_number_is_read_back(layer: int, expert: int, projection: str, scale: bool) -> None:
    text = f"{expert_prefix(layer, expert)}{projection}_proj.weight{'_scale_inv' if scale else ''}"
    name = parse_name(text)
    assert (name.role, name.layer, name.expert, name.is_scale) == (Role.ROUTED_EXPERT, layer, expert, scale)


def test_missing_scales_are_named() -> None:
    weight = "model.layers.3.mlp.experts.1.up_proj.weight"
    assert find_missing_scales([(weight, "F8_E4M3")]) == [weight]
    assert find_missing_scales([(weight, "F8_E4M3"), (f"{weight}_scale_inv", "F32")]) == []
    assert find_missing_scales([(weight, "BF16")]) == []
    # Another grammar may keep its scales under another name.
    assert find_missing_scales([("blocks.3.w1.weight", "F8_E4M3")]) == []
