"""The grammar of checkpoint tensor names: a name <-> layer, role, expert, projection, part.

Covers the names of DeepSeek-V2, V2-Lite, V3, R1, V3.2, Kimi-K2 and Moonlight, which share one grammar, and two that
only GGUF files need: ``self_attn.k_b_proj`` and ``v_b_proj``, the halves of kv_b_proj; see `manifests.gguf_names`.
A name outside it is never lost: it gets the role ``unknown``, with its layer when it shows one.
This file knows names only; which file a tensor goes to is the matter of `manifests.paths`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a tensor does in the model."""

    EMBEDDING = "embedding"
    FINAL_NORM = "final_norm"
    LM_HEAD = "lm_head"
    ATTENTION = "attention"
    NORM = "norm"
    DENSE_MLP = "dense_mlp"
    ROUTER = "router"
    SHARED_EXPERT = "shared_expert"
    ROUTED_EXPERT = "routed_expert"
    MTP = "mtp"
    MTP_EMBEDDING = "mtp_embedding"
    MTP_HEAD = "mtp_head"
    BUFFER = "buffer"
    UNKNOWN = "unknown"


SCALE_PART = "weight_scale_inv"
"""The FP8 block multipliers; a multiplier despite its name. Source: DeepSeek-V3 README_WEIGHTS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorName:
    """A parsed name.

    Attributes:
        layer: Number in ``model.layers.N``, None outside the layers.
        role: What it does.
        expert: Number of the routed expert, else None.
        projection: The module within its role, such as ``q_a_proj`` or ``gate_proj``; empty when there is none.
        part: The last component: ``weight``, ``weight_scale_inv``, ``bias``, ``e_score_correction_bias``.
        text: The name itself.
    """

    layer: int | None
    role: Role
    expert: int | None
    projection: str
    part: str
    text: str

    @property
    def is_scale(self) -> bool:
        """Whether this holds block scales of another tensor, and so no parameters of its own."""
        return self.part == SCALE_PART


# No leading zeros and at most four digits: a number that prints back as it was read, and never a huge one.
_NUMBER = r"(?:0|[1-9][0-9]{0,3})"
_LAYER = re.compile(rf"model\.layers\.({_NUMBER})\.(.+)", re.DOTALL)
_MLP = r"(?P<projection>gate_proj|up_proj|down_proj)"
_PART = r"(?P<part>weight|weight_scale_inv|bias)"

_GLOBAL_PATTERNS = [
    (re.compile(pattern), role)
    for pattern, role in (
        (rf"model\.(?P<projection>embed_tokens)\.{_PART}", Role.EMBEDDING),
        (rf"model\.(?P<projection>norm)\.{_PART}", Role.FINAL_NORM),
        (rf"(?P<projection>lm_head)\.{_PART}", Role.LM_HEAD),
    )
]
_LAYER_PATTERNS = [
    (re.compile(pattern), role)
    for pattern, role in (
        # Most of a checkpoint is routed experts, so they are tried first.
        (rf"mlp\.experts\.(?P<expert>{_NUMBER})\.{_MLP}\.{_PART}", Role.ROUTED_EXPERT),
        (
            r"self_attn\.(?P<projection>q_proj|q_a_proj|q_a_layernorm|q_b_proj|kv_a_proj_with_mqa|kv_a_layernorm"
            rf"|kv_b_proj|k_b_proj|v_b_proj|o_proj|indexer\.(?:wq_b|wk|k_norm|weights_proj))\.{_PART}",
            Role.ATTENTION,
        ),
        (r"self_attn\.(?P<projection>rotary_emb)\.(?P<part>inv_freq)", Role.BUFFER),
        (rf"(?P<projection>input_layernorm|post_attention_layernorm)\.{_PART}", Role.NORM),
        (rf"mlp\.{_MLP}\.{_PART}", Role.DENSE_MLP),
        (r"mlp\.(?P<projection>gate)\.(?P<part>weight|bias|e_score_correction_bias)", Role.ROUTER),
        (rf"mlp\.shared_experts\.{_MLP}\.{_PART}", Role.SHARED_EXPERT),
        (rf"(?P<projection>enorm|hnorm|eh_proj|shared_head\.norm)\.{_PART}", Role.MTP),
        (rf"(?P<projection>embed_tokens)\.{_PART}", Role.MTP_EMBEDDING),
        (rf"(?P<projection>shared_head\.head)\.{_PART}", Role.MTP_HEAD),
    )
]


def parse_name(name: str) -> TensorName:
    """Parse any tensor name; what the grammar does not know gets the role ``unknown``."""
    layer, rest, patterns = None, name, _GLOBAL_PATTERNS
    if match := _LAYER.fullmatch(name):
        layer, rest, patterns = int(match[1]), match[2], _LAYER_PATTERNS
    for pattern, role in patterns:
        if match := pattern.fullmatch(rest):
            groups = match.groupdict()
            expert = groups.get("expert")
            return TensorName(
                layer=layer,
                role=role,
                expert=None if expert is None else int(expert),
                projection=groups["projection"],
                part=groups["part"],
                text=name,
            )
    return TensorName(
        layer=layer, role=Role.UNKNOWN, expert=None, projection="", part=rest.rpartition(".")[2], text=name
    )


def expert_prefix(layer: int, expert: int) -> str:
    """The prefix of a routed expert's tensor names, with its final dot."""
    return f"model.layers.{layer}.mlp.experts.{expert}."


def find_missing_scales(tensors: Iterable[tuple[str, str]]) -> list[str]:
    """Names of FP8 weights without their block scales, which therefore have no value.

    Only names of the grammar are judged: another one may keep its scales elsewhere.

    Args:
        tensors: Name and dtype tag of every tensor of a checkpoint.
    """
    dtypes = dict(tensors)
    return [
        name
        for name, dtype in dtypes.items()
        if dtype == "F8_E4M3"
        and name.endswith(".weight")
        and f"{name}_scale_inv" not in dtypes
        and parse_name(name).role is not Role.UNKNOWN
    ]
