"""Tensor names of GGUF files of architecture ``deepseek2``, and Hugging Face's for the same: both ways.

A GGUF file stacks the routed experts of a layer in one tensor for each projection, [experts, out, in]; Hugging Face's
names have one tensor for each expert. ``ffn_gate_up_exps`` stacks two projections: of each expert the rows of gate,
then those of up. ``attn_k_b`` and ``attn_v_b`` are kv_b_proj cut in two (k_b transposed for each head: [heads, latent,
nope]), which has no name of Hugging Face's; here they are ``self_attn.k_b_proj`` and ``self_attn.v_b_proj``.
A name outside the grammar is not lost: it has no translation, and keeps itself.
Source: the tensor names of the ggml project's gguf package for DEEPSEEK2; for the order in ``ffn_gate_up_exps``
llama.cpp's graph of the experts, which takes the first half of each expert's rows as gate.
"""

import re
from dataclasses import dataclass

from manifests.names import Role, expert_prefix, parse_name

ARCHITECTURE = "deepseek2"
"""The name that DeepSeek-V2, V3, R1, Kimi-K2 and Moonlight have in ``general.architecture``."""

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PROJECTIONS = ("gate", "up", "down")
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn_k_b.weight": "self_attn.k_b_proj.weight",
    "attn_v_b.weight": "self_attn.v_b_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    **{f"ffn_{name}.weight": f"mlp.{name}_proj.weight" for name in _PROJECTIONS},
    **{f"ffn_{name}_shexp.weight": f"mlp.shared_experts.{name}_proj.weight" for name in _PROJECTIONS},
}
_STACKED = {
    **{f"ffn_{name}_exps.weight": (f"{name}_proj.weight",) for name in _PROJECTIONS},
    "ffn_gate_up_exps.weight": ("gate_proj.weight", "up_proj.weight"),
}
# The other way an expert's matrix is looked for in the tensor of its own projection.
_STACKED_BACK = {names[0]: name for name, names in _STACKED.items() if len(names) == 1}
_GLOBAL_BACK = {ours: name for name, ours in _GLOBAL.items()}
_LAYER_BACK = {ours: name for name, ours in _LAYER.items()}

# As in `manifests.names`: a number that prints back as it was read, and never a huge one.
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A tensor that holds a matrix or two of every routed expert of a layer.

    Attributes:
        layer: Number of the layer.
        parts: What each expert has in it, in this order, such as ``gate_proj.weight``.
    """

    layer: int
    parts: tuple[str, ...]

    def names(self, expert: int) -> tuple[str, ...]:
        """Hugging Face's names of one expert's parts, in their order."""
        return tuple(expert_prefix(self.layer, expert) + part for part in self.parts)


def to_hugging_face(name: str) -> str | Stack:
    """What Hugging Face calls a tensor of a ``deepseek2`` file; the name itself when the grammar does not know it."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _GLOBAL.get(name, name)
    layer, rest = int(match[1]), match[2]
    if rest in _STACKED:
        return Stack(layer=layer, parts=_STACKED[rest])
    return f"model.layers.{layer}.{_LAYER[rest]}" if rest in _LAYER else name


def to_gguf(name: str) -> str | None:
    """The GGUF tensor that holds what Hugging Face calls so, for an expert the stack; None when there is none."""
    if name in _GLOBAL_BACK:
        return _GLOBAL_BACK[name]
    parsed = parse_name(name)
    if parsed.layer is None:
        return None
    if parsed.role is Role.ROUTED_EXPERT:
        rest = _STACKED_BACK.get(f"{parsed.projection}.{parsed.part}")
    else:
        rest = _LAYER_BACK.get(name.removeprefix(f"model.layers.{parsed.layer}."))
    return None if rest is None else f"blk.{parsed.layer}.{rest}"
