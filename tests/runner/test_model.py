"""The decoder against the plain transcription, and what it promises about weights: late, one at a time, none extra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import runner
import runner.fp8
from manifests.errors import IntegrityError, ManifestError, ResourceError, ToolkitError
from runner import kernels
from runner.cache import LatentCache
from runner.config import ModelConfig
from runner.fp8 import Matrix
from runner.model import Model

Tiny = Callable[[str], dict[str, Tensor]]
Configs = dict[str, dict[str, Any]]
FAMILIES = ["v3", "kimi", "moonlight", "v2_lite", "v2"]


def prompt(count: int = 24, seed: int = 5) -> Tensor:
    return torch.randint(0, 288, (count,), generator=torch.Generator().manual_seed(seed))


def run(model: Model, ids: Tensor, chunk: int = 1000) -> Tensor:
    cache = LatentCache(model.config, len(ids))
    return model.logits(torch.cat([model.hidden(part, cache) for part in ids.split(chunk)]))


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": True}, {"norm_topk_prob": False}])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_transcription(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny, family: str, changes: dict[str, Any]
) -> None:
    raw, weights, ids = tiny_configs[family] | changes, tiny_weights(family), prompt()
    expected = reference.deepseek.forward(raw, reference.tiny.expand(weights, reference.fp8.dequantize), ids.tolist())
    assert expected.std() > 1
    ours = run(Model(ModelConfig.from_dict(raw), reference.tiny.DictStore(weights)), ids)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4)


def test_most_chosen_scores_are_negative_in_the_tiny_model(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny
) -> None:
    """Else a mask of 0.0 would pass the comparisons above."""
    weights = tiny_weights("v3")
    chosen: list[Tensor] = []
    model = Model(ModelConfig.from_dict(tiny_configs["v3"]), reference.tiny.DictStore(weights))
    model.observer = lambda layer, ids: chosen.append(
        weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][ids]
    )
    run(model, prompt())
    # A biased score is at most 1 above its bias, and half of the scores are below 0.5.
    assert float((torch.cat(chosen) < -0.5).float().mean()) > 0.4


@pytest.mark.parametrize("family", ["v3", "v2_lite"])
def test_chunks_do_not_matter(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny, family: str
) -> None:
    model = Model(ModelConfig.from_dict(tiny_configs[family]), reference.tiny.DictStore(tiny_weights(family)))
    ids = prompt(60)
    whole = run(model, ids)
    for chunk in (1, 7, 32, 59):
        torch.testing.assert_close(run(model, ids, chunk), whole, rtol=0, atol=1e-4)


@pytest.fixture(params=kernels.supported())
def _compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    library = kernels.library()
    assert library is not None
    chosen = kernels.Kernels(library, request.param)
    monkeypatch.setattr(kernels, "active", lambda: chosen)


def assert_neither_chunks_nor_threads_matter(model: Model, ids: Tensor) -> None:
    """For the hidden states and for the head."""
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in (len(ids), 1, 3, 7):
            cache = LatentCache(model.config, len(ids))
            found.append(torch.cat([model.logits(model.hidden(part, cache)) for part in ids.split(size)]))
            assert torch.equal(found[-1], found[0]), (threads, size)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_gets_the_same_bits_whatever_comes_with_it(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny, family: str
) -> None:
    model = Model(ModelConfig.from_dict(tiny_configs[family]), reference.tiny.DictStore(tiny_weights(family)))
    assert_neither_chunks_nor_threads_matter(model, prompt(43))


@pytest.mark.usefixtures("_compiled")
def test_a_token_of_the_demo_gets_the_same_bits_whatever_comes_with_it() -> None:
    model = runner.load().model
    assert_neither_chunks_nor_threads_matter(model, torch.arange(60, 103))


def test_the_same_run_gives_the_same_bits(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny
) -> None:
    model = Model(ModelConfig.from_dict(tiny_configs["v3"]), reference.tiny.DictStore(tiny_weights("v3")))
    assert torch.equal(run(model, prompt()), run(model, prompt()))


def test_building_a_model_asks_for_nothing(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny
) -> None:
    store = reference.tiny.DictStore(tiny_weights("v3"))
    Model(ModelConfig.from_dict(tiny_configs["v3"]), store)
    assert not store.asked


def test_only_what_is_used_is_asked_for(reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny) -> None:
    """No expert that was not chosen, nothing of the MTP layer, no head for hidden states alone."""
    weights = tiny_weights("v3")
    mtp = {name.replace("layers.2.", "layers.3."): tensor for name, tensor in weights.items() if "layers.2." in name}
    store = reference.tiny.DictStore(weights | mtp)
    chosen: set[tuple[int, int]] = set()
    model = Model(ModelConfig.from_dict(tiny_configs["v3"]), store)
    model.observer = lambda layer, ids: chosen.update((layer, expert) for expert in ids.flatten().tolist())
    model.hidden(prompt(2), LatentCache(model.config, 2))
    asked = {(int(name.split(".")[2]), int(name.split(".")[5])) for name in store.asked if ".experts." in name}
    assert asked == chosen
    assert len(chosen) < 32
    assert not [name for name in store.asked if "layers.3." in name or name.startswith("lm_head")]
    assert set(store.asked.values()) == {1}


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("family", ["v3", "v2"])
def test_never_two_expanded_weights_at_a_time(
    reference: SimpleNamespace,
    tiny_configs: Configs,
    tiny_weights: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """Every expansion must find the memory of the one before it already freed, views of it included."""
    expand, alive, count = runner.fp8._expand, [], 0

    def watched(matrix: Matrix, begin: int, end: int) -> Tensor:
        nonlocal count
        assert all(reference.expired() for reference in alive), f"{matrix.name} was expanded beside another one"
        made = expand(matrix, begin, end)
        alive[:] = [StorageWeakRef(made.untyped_storage())]
        count += 1
        return made

    monkeypatch.setattr(runner.fp8, "_expand", watched)
    model = Model(ModelConfig.from_dict(tiny_configs[family]), reference.tiny.DictStore(tiny_weights(family)))
    run(model, prompt())
    assert count > 50


def test_embedding_rows_alone_are_widened(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    widen = runner.fp8.widen
    monkeypatch.setattr(
        "runner.parameters.widen", lambda tensor, name: (shapes.append(tuple(tensor.shape)), widen(tensor, name))[1]
    )
    model = Model(ModelConfig.from_dict(tiny_configs["v3"]), reference.tiny.DictStore(tiny_weights("v3")))
    model.hidden(prompt(3), LatentCache(model.config, 3))
    assert shapes[0] == (3, 200)
    assert (288, 200) not in shapes


def test_bfloat16_mode_is_near_and_not_the_same(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny
) -> None:
    """V2-Lite's tiny model: no expert is chosen differently for the first tokens, so rounding is all there is."""
    config, store = ModelConfig.from_dict(tiny_configs["v2_lite"]), reference.tiny.DictStore(tiny_weights("v2_lite"))
    exact, rounded = run(Model(config, store), prompt(8)), run(Model(config, store, dtype=torch.bfloat16), prompt(8))
    assert rounded.dtype == torch.float32
    assert 1e-3 < float((exact - rounded).abs().max()) < 0.3
    with pytest.raises(ToolkitError, match="float16"):
        Model(config, store, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_stored_dtypes(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny, dtype: torch.dtype
) -> None:
    config, weights = ModelConfig.from_dict(tiny_configs["v2_lite"]), tiny_weights("v2_lite")
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    before = {name: tensor.clone() for name, tensor in stored.items()}
    ours = run(Model(config, reference.tiny.DictStore(stored)), prompt(6))
    exact = run(Model(config, reference.tiny.DictStore(weights)), prompt(6))
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-2 if dtype == torch.float16 else 1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.items()), "a stored weight was written to"


def test_the_block_size_comes_from_the_config(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny
) -> None:
    weights = tiny_weights("v3")
    config = ModelConfig.from_dict(tiny_configs["v3"])
    with pytest.raises(IntegrityError, match=r"q_a_proj\.weight.*scale grid"):
        run(Model(replace(config, weight_block_size=(64, 64)), reference.tiny.DictStore(weights)), prompt(2))
    with pytest.raises(ManifestError, match=r"q_a_proj\.weight.*quantization_config"):
        run(Model(replace(config, weight_block_size=None), reference.tiny.DictStore(weights)), prompt(2))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "lm_head.weight",
    ],
)
def test_a_tensor_of_another_shape_is_named(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny, name: str
) -> None:
    weights = dict(tiny_weights("v3"))
    weights[name] = weights[name][:-1]
    with pytest.raises(IntegrityError, match=name):
        run(Model(ModelConfig.from_dict(tiny_configs["v3"]), reference.tiny.DictStore(weights)), prompt())


def test_ids_outside_the_vocabulary_and_a_full_cache_leave_the_cache_alone(
    reference: SimpleNamespace, tiny_configs: Configs, tiny_weights: Tiny
) -> None:
    model = Model(ModelConfig.from_dict(tiny_configs["v3"]), reference.tiny.DictStore(tiny_weights("v3")))
    cache = LatentCache(model.config, 5)
    model.hidden(prompt(3), cache)
    for bad in (-1, 288):
        with pytest.raises(ToolkitError, match="vocabulary of 288"):
            model.hidden(torch.tensor([bad]), cache)
    with pytest.raises(ResourceError):
        model.hidden(prompt(3), cache)
    assert cache.length == 3
