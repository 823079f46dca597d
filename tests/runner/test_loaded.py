"""A checkpoint that writes text: why it ends, what it counts, how it samples, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runner
from manifests.errors import (
    IntegrityError,
    ManifestError,
    ResourceError,
    SourceNotFoundError,
    ToolkitError,
    UnsupportedModelError,
)
from runner import demo
from runner.loaded import LoadedModel, choose_sampling
from runner.sampling import SamplingParams

EditedCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return LoadedModel(tiny_checkpoint)


@pytest.fixture
def edited(tiny_checkpoint: Path, tmp_path: Path) -> EditedCheckpoint:
    """A copy of the tiny checkpoint with some files replaced (a document, bytes, or None to remove it)."""

    def edit(files: dict[str, Any] | None = None, **config: Any) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(tiny_checkpoint, folder)
        if config:
            old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            files = {"config.json": old | config, **(files or {})}
        for name, content in (files or {}).items():
            if content is None:
                (folder / name).unlink()
            elif isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return folder

    return edit


def test_a_tokenizer_that_is_read_later_counts_already(
    edited: EditedCheckpoint, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V3's takes 70 MB, and is read when the memory is long divided."""
    monkeypatch.setattr("runner.machine.resident_bytes", lambda: 200_000_000)
    without = LoadedModel(edited({"tokenizer.json": None})).budget.process
    size = (tiny_checkpoint / "tokenizer.json").stat().st_size
    assert LoadedModel(tiny_checkpoint).budget.process >= without + 8 * size


def test_an_expert_without_numbers_is_refused_by_name(edited: EditedCheckpoint) -> None:
    folder = edited()
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.startswith("model.layers.1.mlp.experts.") and name.endswith(".gate_proj.weight"):
                tensors[name] = tensor[:0]
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"model\.layers\.1\.mlp\.experts\.\d\.gate_proj\.weight has no numbers"):
        LoadedModel(folder).logits([3, 4, 5])


# --- generation ---


def test_generation_is_what_the_engine_says(loaded: LoadedModel) -> None:
    ids = loaded.text.encode("hello")
    expected = list(loaded.engine.generate(ids, max_tokens=12, sampling=SamplingParams(), eos_ids=loaded.text.eos_ids))
    generation = loaded.start(ids, max_tokens=12)
    text = "".join(generation)
    assert generation.ids == expected
    assert text == loaded.text.decode(expected) == loaded.generate("hello", max_tokens=12)
    assert generation.finish_reason == "length"
    stats = generation.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.decode_steps) == (len(ids), 12, 11)
    assert (loaded.weights.usage.files, set(stats.experts_used)) == (2, {1, 2})


def test_it_ends_at_eos(edited: EditedCheckpoint, loaded: LoadedModel) -> None:
    ids = loaded.text.encode("hello")
    plain = loaded.start(ids, max_tokens=8)
    list(plain)
    eos = plain.ids[5]
    ended = LoadedModel(edited(eos_token_id=eos)).start(ids, max_tokens=8)
    text = "".join(ended)
    until = plain.ids[: plain.ids.index(eos)]
    assert (ended.ids, ended.finish_reason, text) == (until, "eos", loaded.text.decode(until))
    assert ended.stats.decode_steps == len(until)  # the step that found the end is counted


def test_it_ends_before_a_stop_string(loaded: LoadedModel) -> None:
    ids = loaded.text.encode("hello")
    whole = "".join(loaded.start(ids, max_tokens=24))
    stop = next(whole[at : at + 2] for at in range(3, len(whole)) if "\ufffd" not in whole[at : at + 2])
    stopped = loaded.start(ids, max_tokens=24, stops=[stop])
    assert "".join(stopped) == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.ids) < 24


def test_what_was_held_back_for_a_stop_comes_at_the_end(loaded: LoadedModel) -> None:
    ids = loaded.text.encode("hello")
    whole = "".join(loaded.start(ids, max_tokens=12))
    assert "".join(loaded.start(ids, max_tokens=12, stops=[whole[-1] + "never"])) == whole


def test_an_end_inside_a_character_is_shown(loaded: LoadedModel) -> None:
    ids = loaded.text.encode("hello")
    ends = []
    for max_tokens in range(1, 25):
        generation = loaded.start(ids, max_tokens=max_tokens)
        text = "".join(generation)
        assert text == loaded.text.decode(generation.ids)
        ends.append(text[-1:])
    assert "\ufffd" in ends  # else this test sees nothing


def test_it_ends_when_the_context_is_full(tiny_checkpoint: Path, loaded: LoadedModel) -> None:
    ids = loaded.text.encode("hello")
    small = LoadedModel(tiny_checkpoint, ctx=len(ids) + 4)
    full = small.start(ids, max_tokens=50)
    list(full)
    # Four tokens have a place in the context, and the last one needs none: it is never read.
    assert (len(full.ids), full.finish_reason) == (5, "context")
    exact = small.start(ids, max_tokens=5)
    list(exact)
    assert (exact.ids, exact.finish_reason) == (full.ids, "length")
    unbounded = loaded.start(ids, max_tokens=5)
    list(unbounded)
    assert full.ids == unbounded.ids


def test_a_prompt_beyond_the_context_is_refused(tiny_checkpoint: Path) -> None:
    small = LoadedModel(tiny_checkpoint, ctx=3)
    with pytest.raises(ResourceError, match="--ctx"):
        small.start([0, 5, 6, 7])


def test_until_it_ends_it_counts_as_interrupted(loaded: LoadedModel) -> None:
    generation = loaded.start(loaded.text.encode("hello"), max_tokens=50)
    iterator = iter(generation)
    next(iterator)
    assert (generation.finish_reason, generation.stats.generated_tokens) == ("interrupted", len(generation.ids))


def test_a_kept_beginning_is_not_computed_again(tiny_checkpoint: Path) -> None:
    loaded = LoadedModel(tiny_checkpoint)
    first = loaded.start(loaded.text.encode("hello"), max_tokens=4)
    list(first)
    longer = [*loaded.text.encode("hello"), *first.ids, 20, 21]
    second = loaded.start(longer, max_tokens=2)
    list(second)
    # All but the last new token were read before.
    assert (second.stats.prompt_tokens, second.stats.prefill_tokens) == (len(longer), 3)


def test_the_seed_decides(loaded: LoadedModel) -> None:
    first, again, other = (loaded.generate("hello", max_tokens=16, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


# --- logits ---


def test_logits_of_a_text_and_of_ids(loaded: LoadedModel) -> None:
    ids = loaded.text.encode("hello")
    logits = loaded.logits("hello")
    assert logits.shape == (len(ids), 300)
    assert torch.equal(logits, loaded.logits(ids))


def test_ids_need_no_tokenizer(edited: EditedCheckpoint, loaded: LoadedModel) -> None:
    bare = LoadedModel(edited({"tokenizer.json": None}))
    assert torch.equal(bare.logits([0, 5]), loaded.logits([0, 5]))
    with pytest.raises(SourceNotFoundError, match="tokenizer"):
        bare.generate("hello")


# --- sampling ---


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        ({}, {}, SamplingParams()),
        ({"temperature": 0.6}, {}, SamplingParams()),
        ({"do_sample": False, "temperature": 0.6}, {}, SamplingParams()),
        ({"do_sample": True}, {}, SamplingParams(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
            {"seed": 9},
            SamplingParams(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, seed=9),
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95},
            {"temperature": 0.0, "top_p": None},
            SamplingParams(temperature=0.0, top_p=0.95),
        ),
        ({"do_sample": True, "top_k": None}, {}, SamplingParams(temperature=1.0)),
        ({}, {"temperature": 0.7}, SamplingParams(temperature=0.7)),
    ],
)
def test_sampling(config: dict[str, Any], given: dict[str, Any], expected: SamplingParams) -> None:
    assert choose_sampling(config, given) == expected


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_k": 0.5}, {"top_p": True}, {"temperature": -1}])
def test_sampling_that_cannot_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="generation_config"):
        choose_sampling({"do_sample": True, **wrong}, {})


def test_a_wrong_option_is_not_blamed_on_the_file() -> None:
    with pytest.raises(ToolkitError, match="temperature") as caught:
        choose_sampling({"do_sample": True}, {"temperature": -1.0})
    assert not isinstance(caught.value, ManifestError)


# --- opening ---


def test_load_is_the_way_in(tiny_checkpoint: Path, loaded: LoadedModel) -> None:
    model = runner.load(tiny_checkpoint, ctx=64)
    assert model.ctx == 64
    assert model.generate("hello", max_tokens=6) == loaded.generate("hello", max_tokens=6)


def test_without_a_path_the_demo_is_opened(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "path", lambda: tiny_checkpoint)
    assert runner.load().root == tiny_checkpoint
    monkeypatch.setattr(demo, "path", lambda: tiny_checkpoint / "absent")
    with pytest.raises(SourceNotFoundError, match=r"embedded model is not installed.*-m"):
        runner.load()


def test_opening_reads_nothing(tiny_checkpoint: Path) -> None:
    assert LoadedModel(tiny_checkpoint).weights.usage.files == 0


def test_a_folder_without_config_is_refused(edited: EditedCheckpoint) -> None:
    with pytest.raises(SourceNotFoundError, match=r"no config\.json"):
        LoadedModel(edited({"config.json": None}))


def test_an_unsupported_config_is_refused(edited: EditedCheckpoint) -> None:
    with pytest.raises(UnsupportedModelError, match="deepseek_v32"):
        LoadedModel(edited(model_type="deepseek_v32"))


def test_a_context_beyond_the_model_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ResourceError, match="1 to 512"):
        LoadedModel(tiny_checkpoint, ctx=513)


def test_fp8_weights_without_scales_are_refused_before_anything_runs(tiny_copy: Path) -> None:
    """Not minutes later, when a token first selects the expert."""
    save_file(
        {"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)},
        tiny_copy / "model-00001-of-000002.safetensors",
    )
    index = {
        "weight_map": {"model.layers.1.mlp.experts.3.up_proj.weight": "model-00001-of-000002.safetensors"},
    }
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ManifestError, match=r"experts\.3\.up_proj\.weight \(1 in all\) has no weight_scale_inv"):
        LoadedModel(tiny_copy)
