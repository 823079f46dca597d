"""DeepSeek-V2 and V3 written down token by token in float64: no cache, no absorbed products, no tensor tricks.

A transcription of the published formulas with DeepSeek's short names, from a raw config.json dictionary with
``rope_scaling``. It shares no code with the project, so a mistake has to be made twice to go unseen. Attention is in
its plain form: keys and values are built for every head. Weights are plain tensors by their Hugging Face names.
"""

import math
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]
Weights = dict[str, Tensor]

NORM_EPS_OF_LOW_RANK = 1e-6


def forward(config: Config, weights: Weights, ids: list[int]) -> Tensor:
    """Logits after every token, [T, V] float64."""
    x = stream(config, weights, ids)
    eps = config["rms_norm_eps"]
    out = [matvec(weights, "lm_head", norm(one, weights["model.norm.weight"], eps)) for one in x]
    return torch.stack(out)


def stream(config: Config, weights: Weights, ids: list[int]) -> list[Tensor]:
    """The residual stream of every token behind the last layer."""
    x = [weights["model.embed_tokens.weight"][one].double() for one in ids]
    for layer in range(config["num_hidden_layers"]):
        x = decoder_layer(config, weights, layer, x)
    return x


def decoder_layer(config: Config, weights: Weights, layer: int, x: list[Tensor]) -> list[Tensor]:
    """A whole layer on a whole text."""
    p, eps = f"model.layers.{layer}", config["rms_norm_eps"]
    normed = [norm(one, weights[f"{p}.input_layernorm.weight"], eps) for one in x]
    x = [one + y for one, y in zip(x, attention(config, weights, f"{p}.self_attn", normed), strict=True)]
    normed = [norm(one, weights[f"{p}.post_attention_layernorm.weight"], eps) for one in x]
    dense = layer < config["first_k_dense_replace"]
    return [
        one + (mlp(weights, f"{p}.mlp", y) if dense else moe(config, weights, f"{p}.mlp", y))
        for one, y in zip(x, normed, strict=True)
    ]


def mtp(config: Config, weights: Weights, hidden: list[Tensor], following: list[int]) -> Tensor:
    """Logits of the MTP layer, [T, V] float64, from a hidden state and the token that follows it, for a whole text."""
    layer, eps = config["num_hidden_layers"], config["rms_norm_eps"]
    p = f"model.layers.{layer}"
    x = []
    for h, one in zip(hidden, following, strict=True):
        embedded = norm(weights["model.embed_tokens.weight"][one].double(), weights[f"{p}.enorm.weight"], eps)
        x.append(matvec(weights, f"{p}.eh_proj", torch.cat([embedded, norm(h, weights[f"{p}.hnorm.weight"], eps)])))
    x = decoder_layer(config, weights, layer, x)
    out = [matvec(weights, "lm_head", norm(one, weights[f"{p}.shared_head.norm.weight"], eps)) for one in x]
    return torch.stack(out)


def matvec(weights: Weights, name: str, x: Tensor) -> Tensor:
    """One matrix times one vector."""
    return weights[f"{name}.weight"].double() @ x


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of one vector."""
    return x / math.sqrt(float((x * x).mean()) + eps) * weight.double()


def attention(config: Config, weights: Weights, p: str, xs: list[Tensor]) -> list[Tensor]:
    """Causal MLA over a whole text, one output vector per input vector."""
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, v_dim = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    queries, keys, values = [], [], []
    for position, x in enumerate(xs):
        if config.get("q_lora_rank"):
            low = norm(matvec(weights, f"{p}.q_a_proj", x), weights[f"{p}.q_a_layernorm.weight"], NORM_EPS_OF_LOW_RANK)
            q = matvec(weights, f"{p}.q_b_proj", low)
        else:
            q = matvec(weights, f"{p}.q_proj", x)
        ckv = matvec(weights, f"{p}.kv_a_proj_with_mqa", x)
        c = norm(ckv[:rank], weights[f"{p}.kv_a_layernorm.weight"], NORM_EPS_OF_LOW_RANK)
        k_pe = rotate(config, ckv[rank:], position)
        kv = matvec(weights, f"{p}.kv_b_proj", c).view(heads, nope + v_dim)
        q = q.view(heads, nope + rope)
        queries.append([torch.cat((q[h, :nope], rotate(config, q[h, nope:], position))) for h in range(heads)])
        keys.append([torch.cat((kv[h, :nope], k_pe)) for h in range(heads)])
        values.append([kv[h, nope:] for h in range(heads)])
    scale = softmax_scale(config)
    outputs = []
    for i in range(len(xs)):
        mixed = []
        for h in range(heads):
            scores = torch.stack([queries[i][h] @ keys[j][h] for j in range(i + 1)]) * scale
            weight = torch.exp(scores - scores.max())
            weight = weight / weight.sum()
            mixed.append(sum(weight[j] * values[j][h] for j in range(i + 1)))
        outputs.append(matvec(weights, f"{p}.o_proj", torch.cat(mixed)))
    return outputs


def mscale(factor: float, weight: float) -> float:
    """YaRN's growth of attention with the context."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def softmax_scale(config: Config) -> float:
    """192^-0.5 in the published models, times mscale twice."""
    scale = 1 / math.sqrt(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    yarn = config.get("rope_scaling")
    return scale * mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2 if yarn else scale


def frequencies(config: Config) -> list[float]:
    """Angle per position of each pair."""
    dim, base, yarn = config["qk_rope_head_dim"], config["rope_theta"], config.get("rope_scaling")
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    if not yarn:
        return plain

    def correction(rotations: float) -> float:
        length = yarn["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction(yarn["beta_fast"])), 0)
    high = min(math.ceil(correction(yarn["beta_slow"])), dim - 1)
    if low == high:
        high += 0.001
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dim // 2)]
    return [f / yarn["factor"] * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]


def rotate(config: Config, x: Tensor, position: int) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of one vector as complex numbers."""
    yarn = config.get("rope_scaling")
    size = mscale(yarn["factor"], yarn["mscale"]) / mscale(yarn["factor"], yarn["mscale_all_dim"]) if yarn else 1.0
    out = x.clone()
    for i, frequency in enumerate(frequencies(config)):
        angle = position * frequency
        turned = complex(x[2 * i], x[2 * i + 1]) * complex(math.cos(angle), math.sin(angle)) * size
        out[2 * i], out[2 * i + 1] = turned.real, turned.imag
    return out


def mlp(weights: Weights, p: str, x: Tensor) -> Tensor:
    """SwiGLU of one vector."""
    gate, up = matvec(weights, f"{p}.gate_proj", x), matvec(weights, f"{p}.up_proj", x)
    return matvec(weights, f"{p}.down_proj", gate / (1 + torch.exp(-gate)) * up)


def moe(config: Config, weights: Weights, p: str, x: Tensor) -> Tensor:
    """Chosen routed experts by weight, plus the shared ones as they are."""
    logits = matvec(weights, f"{p}.gate", x).tolist()
    if config["model_type"] == "deepseek_v2":
        chosen = route_v2(config, logits)
    else:
        chosen = route_v3(config, logits, weights[f"{p}.gate.e_score_correction_bias"].tolist())
    y = sum(weight * mlp(weights, f"{p}.experts.{expert}", x) for expert, weight in chosen.items())
    return y + mlp(weights, f"{p}.shared_experts", x) if config["n_shared_experts"] else y


def best(scores: dict[int, float], count: int) -> list[int]:
    """Keys of the largest values, the lowest key first among equals."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:count]


def groups(config: Config) -> list[list[int]]:
    """Expert ids of each group, in order."""
    size = config["n_routed_experts"] // config["n_group"]
    return [list(range(g * size, (g + 1) * size)) for g in range(config["n_group"])]


def route_v3(config: Config, logits: list[float], bias: list[float]) -> dict[int, float]:
    """Expert id -> weight: experts outside the best groups do not take part at all."""
    score = [1 / (1 + math.exp(-one)) for one in logits]
    biased = {e: s + b for e, (s, b) in enumerate(zip(score, bias, strict=True))}
    if config["n_group"] > 1:
        group_score = {
            g: sum(sorted((biased[e] for e in members), reverse=True)[:2]) for g, members in enumerate(groups(config))
        }
        kept = best(group_score, config["topk_group"])
        biased = {e: biased[e] for g in kept for e in groups(config)[g]}
    chosen = best(biased, config["num_experts_per_tok"])
    total = sum(score[e] for e in chosen) + 1e-20 if config["norm_topk_prob"] else 1.0
    return {e: score[e] / total * config["routed_scaling_factor"] for e in chosen}


def route_v2(config: Config, logits: list[float]) -> dict[int, float]:
    """Expert id -> weight: normalised weights are not scaled, as in DeepSeek-V2's own code."""
    top = max(logits)
    power = [math.exp(one - top) for one in logits]
    score = {e: one / sum(power) for e, one in enumerate(power)}
    if config["topk_method"] == "group_limited_greedy":
        kept = best(
            {g: max(score[e] for e in members) for g, members in enumerate(groups(config))}, config["topk_group"]
        )
        inside = {e for g in kept for e in groups(config)[g]}
        score = {e: s if e in inside else 0.0 for e, s in score.items()}
    chosen = best(score, config["num_experts_per_tok"])
    if config["norm_topk_prob"]:
        return {e: score[e] / sum(score[one] for one in chosen) for e in chosen}
    return {e: score[e] * config["routed_scaling_factor"] for e in chosen}
