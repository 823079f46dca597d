"""What config.json says about a DeepSeek model, checked once: types, ranges, and what is not supported.

Field names are Hugging Face's. Covered: DeepSeek-V3, V3-0324, V3.1, R1 and their kin (``deepseek_v3``),
Kimi-K2 (``kimi_k2``), Moonlight (``deepseek_v3`` without q-LoRA and YaRN) and DeepSeek-V2 (``deepseek_v2``).
A key that is needed and absent is refused, never guessed; so is every value that would change the mathematics
in a way that is not implemented. This file must not know tensors or paths.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manifests.errors import ManifestError, Problem, UnsupportedModelError
from runner.keys import LARGEST, Keys, inconsistent, show

# Router of each family: what a config means when it does not say (transformers 5 saves neither key for V3),
# and every pair that the family's own code knows.
_ROUTERS: dict[str, tuple[tuple[str, str], ...]] = {
    "deepseek_v2": (("softmax", "greedy"), ("softmax", "group_limited_greedy")),
    "deepseek_v3": (("sigmoid", "noaux_tc"),),
    "kimi_k2": (("sigmoid", "noaux_tc"),),
}

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "norm_topk_prob",
    "routed_scaling_factor",
    "rms_norm_eps",
    "max_position_embeddings",
)

# Keys that may be absent or null, and the only other value that is implemented.
_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}

# attention_factor and truncate are known to transformers and to no DeepSeek model; they would change tables.
_ROPE_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN's parameters, under their names in ``rope_scaling``.

    Attributes:
        factor: How many times longer than in pre-training the context may be.
        original_max_position_embeddings: Positions seen in pre-training.
        beta_fast: Rotations over that length above which a frequency stays as it is.
        beta_slow: Rotations below which a frequency is divided by ``factor``.
        mscale: Numerator weight of the factor on cos and sin.
        mscale_all_dim: Denominator weight of the same, and the weight of the softmax scale.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V2 or V3 style model, with the names of config.json.

    Attributes:
        q_lora_rank: None when queries are projected in one step (``q_proj``); config.json says null, 0 or
            nothing.
        n_shared_experts: 0 when there is no shared expert.
        n_group: 1 when experts are not grouped; config.json may say null.
        num_nextn_predict_layers: What the config claims; the checkpoint may still lack the MTP tensors.
        rope_scaling: None without YaRN.
        weight_block_size: Rows and columns that share one ``weight_scale_inv`` of FP8 weights; None without
            FP8.
        tie_word_embeddings: Whether the embedding serves as the head, which the checkpoint then lacks.
        eos_token_ids: Every id that ends a text; config.json has one id, a list, or null.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: YarnScaling | None
    weight_block_size: tuple[int, int] | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed config.json.

        Raises:
            ManifestError: A needed key is absent, or a value has the wrong type, sign or size.
            UnsupportedModelError: A value asks for something that is not implemented.
        """
        keys = Keys(config, "")
        model_type = keys.text("model_type")
        if model_type not in _ROUTERS:
            raise UnsupportedModelError(
                f"config.json has model_type {show(model_type)}; the runner knows {', '.join(sorted(_ROUTERS))}"
            )
        keys.need(*_NEEDED)
        for key, only in _FIXED.items():
            keys.fixed(key, only)
        heads = keys.integer("num_attention_heads")
        if keys.given("num_key_value_heads"):
            keys.fixed("num_key_value_heads", heads)  # MLA expands one latent to every head
        theta, yarn = _read_rope(config)
        scoring_func, topk_method = _read_router(keys, model_type)
        n_group, topk_group = _read_groups(keys, topk_method)
        made = cls(
            model_type=model_type,
            vocab_size=keys.integer("vocab_size"),
            hidden_size=keys.integer("hidden_size"),
            intermediate_size=keys.integer("intermediate_size"),
            moe_intermediate_size=keys.integer("moe_intermediate_size"),
            num_hidden_layers=keys.integer("num_hidden_layers"),
            num_nextn_predict_layers=keys.integer("num_nextn_predict_layers", least=0, otherwise=0),
            num_attention_heads=heads,
            q_lora_rank=keys.integer("q_lora_rank", least=0, otherwise=0) or None,
            kv_lora_rank=keys.integer("kv_lora_rank"),
            qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
            qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
            v_head_dim=keys.integer("v_head_dim"),
            n_routed_experts=keys.integer("n_routed_experts"),
            n_shared_experts=keys.integer("n_shared_experts", least=0, otherwise=0),
            num_experts_per_tok=keys.integer("num_experts_per_tok"),
            n_group=n_group,
            topk_group=topk_group,
            scoring_func=scoring_func,
            topk_method=topk_method,
            norm_topk_prob=keys.boolean("norm_topk_prob"),
            routed_scaling_factor=keys.number("routed_scaling_factor"),
            first_k_dense_replace=keys.integer("first_k_dense_replace", least=0),
            rms_norm_eps=keys.number("rms_norm_eps"),
            max_position_embeddings=keys.integer("max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=yarn,
            weight_block_size=_read_block_size(config),
            tie_word_embeddings=keys.given("tie_word_embeddings") and keys.boolean("tie_word_embeddings"),
            bos_token_id=keys.integer("bos_token_id", least=0) if keys.given("bos_token_id") else None,
            eos_token_ids=_read_eos(keys, config),
        )
        made._check()
        return made

    @property
    def qk_head_dim(self) -> int:
        """Numbers in one head's query: the part without position and the part with."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def _check(self) -> None:
        """Refuse sizes that contradict each other.

        Raises:
            ManifestError: They do.
        """
        experts, groups = self.n_routed_experts, self.n_group
        if self.qk_rope_head_dim % 2:
            inconsistent("qk_rope_head_dim", f"is {self.qk_rope_head_dim}, but RoPE turns pairs of numbers")
        if self.rope_theta <= 1:
            inconsistent("rope_theta", f"is {self.rope_theta}, but frequencies must fall from pair to pair")
        if experts % groups:
            inconsistent("n_group", f"is {groups}, which does not divide n_routed_experts {experts}")
        if self.topk_group > groups:
            inconsistent("topk_group", f"is {self.topk_group}, more than n_group {groups}")
        if self.topk_method == "noaux_tc" and 1 < groups == experts:
            inconsistent("n_group", f"is {groups}, but a group is scored by two experts and has only one")
        choice = experts if self.topk_method == "greedy" else experts // groups * self.topk_group
        if self.num_experts_per_tok > choice:
            inconsistent("num_experts_per_tok", f"is {self.num_experts_per_tok}, but only {choice} can be chosen")


def _read_router(keys: Keys, model_type: str) -> tuple[str, str]:
    """Give (scoring_func, topk_method), the family's own where config.json does not say."""
    known = _ROUTERS[model_type]
    scoring_func = keys.text("scoring_func") if keys.given("scoring_func") else known[0][0]
    topk_method = keys.text("topk_method") if keys.given("topk_method") else known[0][1]
    if (scoring_func, topk_method) not in known:
        pairs = " or ".join(f"{scoring} with {method}" for scoring, method in known)
        raise UnsupportedModelError(
            f"config.json has scoring_func {show(scoring_func)} and topk_method {show(topk_method)}; "
            f"the runner implements {pairs} for {model_type}"
        )
    return scoring_func, topk_method


def _read_groups(keys: Keys, topk_method: str) -> tuple[int, int]:
    """Give (n_group, topk_group); null means that experts are not grouped.

    A router that knows groups needs both keys: V3's code without them would use 8 and 4, others 1 and 1.
    """
    if topk_method != "greedy":
        keys.need("n_group", "topk_group")
    n_group = keys.integer("n_group", otherwise=1)
    # Of several groups, how many are kept cannot be guessed.
    topk_group = keys.integer("topk_group", otherwise=1) if n_group == 1 else keys.integer("topk_group")
    return n_group, topk_group


def _read_rope(config: Mapping[str, Any]) -> tuple[float, YarnScaling | None]:
    """Give (rope_theta, YaRN or None) from ``rope_scaling`` + ``rope_theta`` or from ``rope_parameters``.

    transformers 5 writes the second form, with the base frequency inside. When both are there they must
    agree: transformers lets the old one win, other readers the new one.
    """
    found: dict[str, YarnScaling | None] = {}
    thetas: dict[str, float] = {}
    top = Keys(config, "")
    if top.given("rope_theta"):
        thetas["rope_theta"] = top.number("rope_theta")
    for place in ("rope_scaling", "rope_parameters"):
        if config.get(place) is None:
            continue
        keys = Keys(config[place], place)
        found[place] = _read_yarn(keys, config[place], place)
        if keys.given("rope_theta"):
            thetas[f"{place}.rope_theta"] = keys.number("rope_theta")
    if not thetas:
        thetas["rope_theta"] = top.number("rope_theta")  # refuses: it is absent or null
    for kind, seen in (("scaling", found), ("base frequencies", thetas)):
        if len(set(seen.values())) > 1:
            inconsistent(" and ".join(seen), f"give different RoPE {kind}")
    return next(iter(thetas.values())), next(iter(found.values()), None)


def _read_yarn(keys: Keys, values: Mapping[str, Any], place: str) -> YarnScaling | None:
    rope_types = {keys.text(key) for key in ("rope_type", "type") if keys.given(key)}
    if len(rope_types) > 1:
        inconsistent(f"{place}.rope_type and type", "differ")
    rope_type = next(iter(rope_types), "default")
    if rope_type not in ("default", "yarn"):
        raise UnsupportedModelError(
            f"config.json has {place} of type {show(rope_type)}; the runner implements 'yarn' and none"
        )
    unknown = sorted(key for key, value in values.items() if key not in _ROPE_KEYS and value is not None)
    if unknown:
        raise UnsupportedModelError(
            f"config.json has {place} with {show(unknown[0])}, which the runner does not implement"
        )
    if rope_type == "default":
        return None
    # Defaults of DeepSeek's own rotary class. Without mscale_all_dim the softmax keeps its plain scale.
    return YarnScaling(
        factor=keys.number("factor", least=1.0),
        original_max_position_embeddings=keys.integer("original_max_position_embeddings"),
        beta_fast=keys.number("beta_fast", otherwise=32.0),
        beta_slow=keys.number("beta_slow", otherwise=1.0),
        mscale=keys.number("mscale", least=0.0, otherwise=1.0),
        mscale_all_dim=keys.number("mscale_all_dim", least=0.0, otherwise=0.0),
    )


def _read_block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Give the block of FP8 weights, or None when nothing is quantised.

    ``scale_fmt`` "ue8m0" (V3.1) says how *activations* are rounded by servers that quantise those too; the
    stored weight scales are plain float32 multipliers either way.
    """
    if config.get("quantization_config") is None:
        return None
    place = "quantization_config"
    keys = Keys(config[place], place)
    method = keys.text("quant_method")
    if method != "fp8":
        raise UnsupportedModelError(f"config.json has quant_method {show(method)}; the runner implements 'fp8' only")
    for key, only in (("fmt", "e4m3"), ("activation_scheme", "dynamic"), ("scale_fmt", "ue8m0")):
        keys.fixed(key, only)
    keys.need("weight_block_size")
    block = config[place]["weight_block_size"]
    if block is None:
        raise UnsupportedModelError(f"config.json has {place}.weight_block_size null; the runner needs block scales")
    whole = isinstance(block, list | tuple) and len(block) == 2 and all(type(side) is int for side in block)
    if not whole or not all(1 <= side <= LARGEST for side in block):
        raise ManifestError(
            f"config.json has {place}.weight_block_size {show(block)}; it must be two positive integers",
            [Problem(loc=f"{place}.weight_block_size", kind="invalid_value", message="two positive integers")],
        )
    return block[0], block[1]


def _read_eos(keys: Keys, config: Mapping[str, Any]) -> tuple[int, ...]:
    if not keys.given("eos_token_id"):
        return ()
    value = config["eos_token_id"]
    if not isinstance(value, list):
        return (keys.integer("eos_token_id", least=0),)
    numbered = Keys({f"eos_token_id[{i}]": one for i, one in enumerate(value)}, "")
    return tuple(numbered.integer(f"eos_token_id[{i}]", least=0) for i in range(len(value)))
