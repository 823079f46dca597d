"""transformers' own models, filled with our weights. Slow to import (seconds), hence inside the functions."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]
Weights = dict[str, Tensor]


def load_transformers() -> Any:
    """The package; the import may take seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers  # noqa: PLC0415

        return transformers


def _version(raw: Config) -> str:
    return "V2" if raw["model_type"] == "deepseek_v2" else "V3"


def model_config(raw: Config) -> Any:
    """Their config class, from config.json as published: old rope_scaling and all."""
    # A copy, because rope_theta is put into rope_scaling there.
    plain = copy.deepcopy({key: value for key, value in raw.items() if key != "quantization_config"})
    kind = getattr(load_transformers(), f"Deepseek{_version(raw)}Config")
    return kind.from_dict(plain | {"model_type": f"deepseek_{_version(raw).lower()}"})


def main_model(raw: Config, plain: Weights) -> Any:
    """A model with these float32 weights."""
    config = model_config(raw)
    config._attn_implementation = "eager"
    model = getattr(load_transformers(), f"Deepseek{_version(raw)}ForCausalLM")(config).eval().float()
    layers = range(raw["first_k_dense_replace"], raw["num_hidden_layers"])
    model.load_state_dict(_fused(plain, layers, raw["n_routed_experts"]), strict=True)
    return model


def mtp_model(raw: Config, plain: Weights) -> Any:
    """The MTP layer behind a main model, as ``MtpModel``; ``plain`` holds both."""
    prefix = f"model.layers.{raw['num_hidden_layers']}."
    model = main_model(raw, {name: weight for name, weight in plain.items() if not name.startswith(prefix)})
    model.config.num_mtp_layers = 1
    from transformers.modeling_layers import MtpModel  # noqa: PLC0415

    module = MtpModel(model, 1).eval().float()
    of_layer = {name: weight for name, weight in plain.items() if name.startswith(prefix)}
    names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "post_norm"}
    state = {f"{ours}.weight": of_layer.pop(f"{prefix}{name}.weight") for name, ours in names.items()}
    fused = _fused(of_layer, [raw["num_hidden_layers"]], raw["n_routed_experts"])
    state |= {f"mtp_block.{name.removeprefix(prefix)}": weight for name, weight in fused.items()}
    module.layers[0].load_state_dict(state, strict=True)
    return module


def _fused(plain: Weights, layers: Any, experts: int) -> Weights:
    """Our per-expert names to the stacked ones that transformers 5 has in memory."""
    state = {name: tensor for name, tensor in plain.items() if ".experts." not in name}
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([plain[f"{prefix}.{expert}.{part}_proj.weight"] for expert in range(experts)])
            for part in ("gate", "up", "down")
        )
        state[f"{prefix}.gate_up_proj"], state[f"{prefix}.down_proj"] = torch.cat((gate, up), dim=1), down
    return state
