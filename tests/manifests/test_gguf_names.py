"""Names of GGUF files and Hugging Face's: the ggml project's package agrees, and nothing is lost."""

from __future__ import annotations

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.gguf_names import Stack, to_gguf, to_hugging_face
from manifests.names import Role, parse_name

PAIRS = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
    ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
    ("blk.26.attn_q.weight", "model.layers.26.self_attn.q_proj.weight"),
    ("blk.60.attn_q_a.weight", "model.layers.60.self_attn.q_a_proj.weight"),
    ("blk.60.attn_q_a_norm.weight", "model.layers.60.self_attn.q_a_layernorm.weight"),
    ("blk.60.attn_q_b.weight", "model.layers.60.self_attn.q_b_proj.weight"),
    ("blk.3.attn_kv_a_mqa.weight", "model.layers.3.self_attn.kv_a_proj_with_mqa.weight"),
    ("blk.3.attn_kv_a_norm.weight", "model.layers.3.self_attn.kv_a_layernorm.weight"),
    ("blk.3.attn_kv_b.weight", "model.layers.3.self_attn.kv_b_proj.weight"),
    ("blk.3.attn_k_b.weight", "model.layers.3.self_attn.k_b_proj.weight"),
    ("blk.3.attn_v_b.weight", "model.layers.3.self_attn.v_b_proj.weight"),
    ("blk.3.attn_output.weight", "model.layers.3.self_attn.o_proj.weight"),
    ("blk.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
    ("blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj.weight"),
    ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"),
    ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
    ("blk.3.ffn_gate_inp.weight", "model.layers.3.mlp.gate.weight"),
    ("blk.3.exp_probs_b.bias", "model.layers.3.mlp.gate.e_score_correction_bias"),
    ("blk.3.ffn_gate_shexp.weight", "model.layers.3.mlp.shared_experts.gate_proj.weight"),
    ("blk.3.ffn_up_shexp.weight", "model.layers.3.mlp.shared_experts.up_proj.weight"),
    ("blk.9999.ffn_down_shexp.weight", "model.layers.9999.mlp.shared_experts.down_proj.weight"),
]
UNKNOWN = [
    "", "blk", "blk.3", "blk.3.", "blk.03.attn_norm.weight", "blk.10000.attn_norm.weight", "blk.-1.attn_norm.weight",
    "blk.\u0663.attn_norm.weight", "blk.3.attn_norm", "blk.3.attn_norm.bias", "blk.3.attn_norm.weight\n",
    "blk.3.exp_probs_b.weight", "blk.3.ffn_gate_exps.bias", "blk.3.ffn_gate.0.weight", "blk.3.nextn.eh_proj.weight",
    "output.bias", "rope_freqs.weight", "xtoken_embd.weight", "blk.3.attn_k.weight", "Token_embd.weight",
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_names_have_a_twin_both_ways(theirs: str, ours: str) -> None:
    assert to_hugging_face(theirs) == ours
    assert to_gguf(ours) == theirs
    assert parse_name(ours).role is not Role.UNKNOWN


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_stacked_experts(projection: str) -> None:
    stack = to_hugging_face(f"blk.58.ffn_{projection}_exps.weight")
    assert stack == Stack(layer=58, parts=(f"{projection}_proj.weight",))
    assert isinstance(stack, Stack)
    name = f"model.layers.58.mlp.experts.255.{projection}_proj.weight"
    assert stack.names(255) == (name,)
    assert to_gguf(name) == f"blk.58.ffn_{projection}_exps.weight"
    assert to_gguf(f"{name}_scale_inv") is None


def test_two_projections_in_one_stack() -> None:
    stack = to_hugging_face("blk.1.ffn_gate_up_exps.weight")
    assert isinstance(stack, Stack)
    prefix = "model.layers.1.mlp.experts.7."
    assert stack.names(7) == (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")


def test_the_package_maps_the_same_names() -> None:
    """Its map is from Hugging Face's names, of whole stacks for experts."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 10_000)
    for theirs, ours in PAIRS:
        found = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if ours.endswith("e_score_correction_bias"):
            # The converter writes its last part with a dot before it is looked up.
            found = names.get_name(ours.replace("_bias", ".bias"), try_suffixes=(".weight", ".bias"))
        assert found == theirs, ours
    for projection in ("gate", "up", "down"):
        stack = f"model.layers.5.mlp.experts.{projection}_proj.weight"
        assert names.get_name(stack, try_suffixes=(".weight",)) == f"blk.5.ffn_{projection}_exps.weight"


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_the_grammar_does_not_know_keeps_its_name(name: str) -> None:
    assert to_hugging_face(name) == name
    assert parse_name(name).role is Role.UNKNOWN


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.layers.3.self_attn.indexer.wk.weight",
        "model.layers.3.self_attn.q_proj.weight_scale_inv",
        "model.layers.61.eh_proj.weight",
        "model.layers.03.input_layernorm.weight",
        "model.norm.bias",
        "token_embd.weight",
        "",
    ],
)
def test_what_has_no_place_in_a_gguf_file(name: str) -> None:
    assert to_gguf(name) is None


@given(st.one_of(st.text(), st.lists(st.sampled_from(["blk", "model", "3", "0", "weight", "attn_q"])).map(".".join)))
def test_any_text_is_translated_or_kept(name: str) -> None:
    found = to_hugging_face(name)
    assert found == name or (isinstance(found, str) and to_gguf(found) == name)
