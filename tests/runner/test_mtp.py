"""The MTP layer against transformers' MtpModel, and against the transcription in tests/reference/deepseek.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from manifests.errors import ResourceError
from manifests.names import Role, parse_name
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.expected import mtp_copies, mtp_tensors
from runner.model import Model
from runner.mtp import MtpModule

TOLERANCE = 2e-4
TOKENS = 24


@pytest.fixture(scope="module", params=["v3", "kimi", "moonlight"])
def case(
    request: pytest.FixtureRequest,
    reference: SimpleNamespace,
    tiny_configs: dict[str, dict[str, Any]],
    tiny_mtp_weights: Callable[[str], dict[str, Tensor]],
) -> SimpleNamespace:
    """A model with an MTP layer, 25 tokens, and the main model's residual stream of the first 24."""
    raw, weights = tiny_configs[request.param], tiny_mtp_weights(request.param)
    config, store = ModelConfig.from_dict(raw), reference.tiny.DictStore(weights)
    ids = torch.randint(0, raw["vocab_size"], (TOKENS + 1,), generator=torch.Generator().manual_seed(12))
    model = Model(config, store)
    return SimpleNamespace(
        raw=raw,
        config=config,
        store=store,
        weights=weights,
        plain=reference.tiny.expand(weights, reference.fp8.dequantize),
        ids=ids,
        model=model,
        mtp=MtpModule(config, store),
        stream=model.stream(ids[:-1], LatentCache(config, TOKENS)),
    )


@pytest.fixture(scope="module", params=["normed", "stream"])
def hidden(request: pytest.FixtureRequest, case: SimpleNamespace) -> Tensor:
    """What the layer is given of the main model: behind the final norm, or before it."""
    return case.stream if request.param == "stream" else case.model.norm(case.stream)


def run(case: SimpleNamespace, hidden: Tensor, sizes: list[int]) -> Tensor:
    """The layer's logits, so many entries at a time."""
    cache, following = case.mtp.new_cache(TOKENS), case.ids[1:]
    parts = zip(hidden.split(sizes), following.split(sizes), strict=True)
    return torch.cat([case.mtp.logits(case.mtp.norm(case.mtp.stream(h, ids, cache))) for h, ids in parts])


@pytest.fixture(scope="module")
def theirs(case: SimpleNamespace, hidden: Tensor, reference: SimpleNamespace) -> Tensor:
    """The logits of transformers; its shared head is the main model's."""
    module = reference.huggingface.mtp_model(case.raw, case.plain)
    from transformers.cache_utils import MtpCache  # noqa: PLC0415

    ids = case.ids[1:].unsqueeze(0)
    with torch.no_grad():
        out = module.forward_layer(
            0,
            hidden.unsqueeze(0),
            torch.arange(1, TOKENS + 1).unsqueeze(0),
            MtpCache(config=module.config),
            input_ids=ids,
        )
        logits: Tensor = module._project_to_logits(out)[0]
    return logits


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("sizes", [[TOKENS], [1] * TOKENS, [5, 1, 16, 2]], ids=["at-once", "one-by-one", "in-parts"])
def test_it_agrees_with_transformers(
    case: SimpleNamespace,
    hidden: Tensor,
    theirs: Tensor,
    sizes: list[int],
    record_property: Callable[[str, object], None],
) -> None:
    worst = float((run(case, hidden, sizes) - theirs).abs().max())
    record_property("max |dlogit|", worst)
    assert theirs.std() > 1
    assert worst < TOLERANCE


def test_it_agrees_with_the_transcription(case: SimpleNamespace, hidden: Tensor, reference: SimpleNamespace) -> None:
    expected = reference.deepseek.mtp(case.raw, case.plain, list(hidden.double()), case.ids[1:].tolist())
    assert (run(case, hidden, [TOKENS]) - expected).abs().max() < TOLERANCE


def test_rows_and_chunks_change_no_bit(case: SimpleNamespace, hidden: Tensor) -> None:
    assert torch.equal(run(case, hidden, [TOKENS]), run(case, hidden, [1] * TOKENS))


def test_what_was_taken_back_leaves_no_trace(case: SimpleNamespace, hidden: Tensor) -> None:
    cache, following = case.mtp.new_cache(TOKENS), case.ids[1:]
    case.mtp.stream(hidden[:10], following[:10], cache)
    case.mtp.stream(hidden[10:14].flip(0), following[10:14].flip(0), cache)
    cache.truncate(10)
    again = case.mtp.stream(hidden[10:], following[10:], cache)
    whole = case.mtp.stream(hidden, following, case.mtp.new_cache(TOKENS))
    assert torch.equal(again, whole[10:])


def test_a_full_cache_is_said_before_anything_is_computed(case: SimpleNamespace, hidden: Tensor) -> None:
    cache, asked = case.mtp.new_cache(TOKENS - 1), case.store.asked.total()
    with pytest.raises(ResourceError, match="context holds 23"):
        case.mtp.stream(hidden, case.ids[1:], cache)
    assert (cache.length, case.store.asked.total()) == (0, asked)


def test_its_names_and_shapes_are_those_of_the_config(case: SimpleNamespace) -> None:
    layer = case.config.num_hidden_layers
    stored = {
        name: tuple(weight.shape)
        for name, weight in case.weights.items()
        if parse_name(name).layer == layer and not parse_name(name).is_scale
    }
    assert dict(mtp_tensors(case.config)) == stored
    roles = [parse_name(name).role for name in mtp_copies(case.config)]
    assert roles == [Role.MTP_EMBEDDING, Role.MTP_HEAD]
    assert {parse_name(name).layer for name in mtp_copies(case.config)} == {layer}
