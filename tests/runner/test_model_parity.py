"""Logits against transformers, whole prompt at once and token by token through the cache.

The tiny models are in tests/reference/tiny.py, with how their numbers keep the comparison from being blind. FP8
weights are expanded by tests/reference/fp8.py before transformers sees them: its own CPU dequantiser raises at
kv_a_proj's ragged rows and misplaces scales where rows divide evenly without being multiples of 128.

Where transformers itself departs from DeepSeek, and what is done here:

* 4.51 to 4.57.6 mask left-out groups with 0.0: test_router has the cases; 5.23 masks with -inf, and the biases here
  are negative, so these models would show it.
* 4.54 to 4.57.6 leave mscale squared out of V2's softmax scale: test_rope has the constants, and V2 is compared here.
* 5.23 ignores V2's ``norm_topk_prob``: false here, true in test_router and test_model against the transcription.
* Rotary halves instead of interleaved pairs: logits are compared, caches and key vectors never.
* The q_a and kv_a norms have eps 1e-6 whatever ``rms_norm_eps`` says, as in DeepSeek's code: "moonlight" has 0.05.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.model import Model

TOLERANCE = 2e-4
FAMILIES = ["v3", "kimi", "moonlight", "v2_lite", "v2"]


@pytest.fixture(scope="module", params=FAMILIES)
def case(
    request: pytest.FixtureRequest,
    reference: SimpleNamespace,
    tiny_configs: dict[str, dict[str, Any]],
    tiny_weights: Callable[[str], dict[str, Tensor]],
) -> SimpleNamespace:
    """Our model, a prompt of 24 tokens, and the oracle's logits for it."""
    raw, weights = tiny_configs[request.param], tiny_weights(request.param)
    plain = reference.tiny.expand(weights, reference.fp8.dequantize)
    theirs = reference.huggingface.main_model(raw, plain)
    ids = torch.randint(0, raw["vocab_size"], (24,), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        logits = theirs(ids.unsqueeze(0)).logits[0]
    config = ModelConfig.from_dict(raw)
    ours = Model(config, reference.tiny.DictStore(weights))
    return SimpleNamespace(name=request.param, config=config, model=ours, ids=ids, logits=logits)


def report(record: Callable[[str, object], None], case: SimpleNamespace, ours: Tensor) -> None:
    """Compare, and keep the figure in the report."""
    worst = float((ours - case.logits).abs().max())
    record(f"{case.name} max |dlogit|", worst)
    print(f"{case.name}: max |dlogit| {worst:.2e}, std of logits {float(case.logits.std()):.2f}")  # noqa: T201
    assert case.logits.std() > 1
    assert worst < TOLERANCE


@pytest.mark.usefixtures("every_way")
def test_prompt_at_once(case: SimpleNamespace, record_property: Callable[[str, object], None]) -> None:
    ours = case.model.logits(case.model.hidden(case.ids, LatentCache(case.config, 24)))
    report(record_property, case, ours)


@pytest.mark.usefixtures("every_way")
def test_token_by_token(case: SimpleNamespace, record_property: Callable[[str, object], None]) -> None:
    cache = LatentCache(case.config, 24)
    ours = torch.cat([case.model.logits(case.model.hidden(one, cache)) for one in case.ids.split(1)])
    report(record_property, case, ours)


def test_attention_and_position_matter_in_the_oracle(case: SimpleNamespace) -> None:
    """The comparison would be blind if the last token alone decided: run it without what came before."""
    alone = case.model.logits(case.model.hidden(case.ids[-1:], LatentCache(case.config, 1)))
    assert (alone[0] - case.logits[-1]).abs().max() > 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_saved_by_transformers_means_the_same(
    reference: SimpleNamespace, tiny_configs: dict[str, dict[str, Any]], family: str
) -> None:
    """It has rope_parameters with the base inside, and neither scoring_func nor topk_method for V3."""
    raw = {key: value for key, value in tiny_configs[family].items() if key != "quantization_config"}
    raw["model_type"] = "deepseek_v2" if family.startswith("v2") else "deepseek_v3"
    bare = {key: value for key, value in raw.items() if key not in ("scoring_func", "topk_method")}
    if family == "v2":
        bare["topk_method"] = raw["topk_method"]
    saved = json.loads(reference.huggingface.model_config(bare).to_json_string(use_diff=False))
    assert "rope_parameters" in saved
    assert "rope_scaling" not in saved
    assert "scoring_func" not in saved
    # Their class claims one MTP layer for every V3 model; the names in the checkpoint say the truth.
    ours, theirs = ModelConfig.from_dict(raw), ModelConfig.from_dict(saved)
    assert replace(theirs, num_nextn_predict_layers=ours.num_nextn_predict_layers) == ours
