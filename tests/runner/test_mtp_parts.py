"""What a checkpoint has of the MTP layer: all, some, none, or something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import manifests
from manifests.errors import ResourceError, UnsupportedModelError
from reshard.cli import reshard
from runner import demo
from runner.config import ModelConfig
from runner.loaded import LoadedModel
from runner.mtp_parts import MtpParts

LAYER = "model.layers.4."
Edit = Callable[[dict[str, torch.Tensor]], None]


def parts_of(folder: Path) -> MtpParts:
    checkpoint = manifests.open(folder)
    return MtpParts(checkpoint, ModelConfig.from_dict(checkpoint.config))


@pytest.fixture(scope="session")
def demo_in_one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without its 163 shards."""
    folder = tmp_path_factory.mktemp("mtp") / "whole"
    folder.mkdir()
    tensors = {name: tensor for shard in demo.path().glob("*.safetensors") for name, tensor in load_file(shard).items()}
    save_file(tensors, folder / "model.safetensors")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (demo.path() / name).exists():
            shutil.copy(demo.path() / name, folder / name)
    return folder


@pytest.fixture
def edited(demo_in_one_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy with other tensors or another config."""

    def edit(change: Edit = lambda _tensors: None, **config: Any) -> Path:
        folder = shutil.copytree(demo_in_one_file, tmp_path / "edited")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | config))
        return folder

    return edit


def resharded(folder: Path) -> Path:
    out = folder.parent / "experts"
    result = CliRunner().invoke(reshard, ["run", str(folder), str(out), "--quiet"])
    assert result.exit_code == 0, result.output
    return out


def drop(*prefixes: str) -> Edit:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefixes)]:
            del tensors[name]

    return change


def test_the_embedded_model_has_all_of_it() -> None:
    parts = parts_of(demo.path())
    assert (parts.layer, parts.claimed, parts.missing, parts.fault) == (4, 1, (), None)
    assert len(parts.sizes) == 412
    assert parts.bytes_by_kind["copies"] == 2 * 4096 * 256 * 2
    assert sum(parts.bytes_by_kind.values()) == sum(parts.sizes.values())
    # Original files have no digests, so nobody knows without reading both.
    assert [copy.state for copy in parts.copies] == ["unknown", "unknown"]
    assert [copy.used for copy in parts.copies] == [f"{LAYER}embed_tokens.weight", f"{LAYER}shared_head.head.weight"]


def test_copies_are_compared_by_digest(edited: Callable[..., Path]) -> None:
    def other_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}shared_head.head.weight"][0, 0] += 1

    parts = parts_of(resharded(edited(other_head)))
    assert [copy.state for copy in parts.copies] == ["equal", "different"]
    assert [copy.used for copy in parts.copies] == ["model.embed_tokens.weight", f"{LAYER}shared_head.head.weight"]
    assert parts.to_document()["copies"][1] == {
        "name": f"{LAYER}shared_head.head.weight",
        "of": "lm_head.weight",
        "state": "different",
        "bytes": 4096 * 256 * 2,
    }


def test_equal_copies_are_never_read(edited: Callable[..., Path]) -> None:
    folder = resharded(edited())
    for file in (folder / "layers").rglob("*.safetensors"):
        if any(name.startswith((f"{LAYER}embed_tokens", f"{LAYER}shared_head.head")) for name in load_file(file)):
            file.unlink()
    loaded = LoadedModel(folder, speculate="on")
    assert [copy.state for copy in loaded.mtp.copies] == ["equal", "equal"]
    assert loaded.generate("def ", max_tokens=12) == LoadedModel(speculate="off").generate("def ", max_tokens=12)
    assert loaded.speculation_document()["guesses"] > 0


def test_without_copies_the_main_models_are_used(edited: Callable[..., Path]) -> None:
    folder = edited(drop(f"{LAYER}embed_tokens", f"{LAYER}shared_head.head"))
    loaded = LoadedModel(folder, speculate="on")
    assert [copy.state for copy in loaded.mtp.copies] == ["absent", "absent"]
    assert loaded.mtp.fault is None
    assert loaded.generate("def ", max_tokens=12) == LoadedModel(speculate="off").generate("def ", max_tokens=12)


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        (drop(LAYER), {"num_nextn_predict_layers": 0}, "this model has no MTP layer"),
        (drop(LAYER), {"num_nextn_predict_layers": None}, "this model has no MTP layer"),
        (drop(LAYER), {}, "config.json announces an MTP layer, but its tensors are not in this checkpoint"),
        (
            drop(f"{LAYER}hnorm", f"{LAYER}self_attn.o_proj"),
            {},
            f"2 tensors of the MTP layer are missing, first {LAYER}",
        ),
        (drop(f"{LAYER}mlp.experts.63."), {}, "3 tensors of the MTP layer are missing"),
    ],
)
def test_what_is_not_there_is_said(
    edited: Callable[..., Path], change: Edit, config: dict[str, Any], sentence: str
) -> None:
    folder = edited(change, **config)
    loaded = LoadedModel(folder)
    assert loaded.speculation is None
    assert loaded.idle_speculation is not None
    assert loaded.idle_speculation.startswith(sentence)
    assert loaded.speculation_document() == {"state": "off", "reason": loaded.idle_speculation}
    assert loaded.generate("def ", max_tokens=5) == LoadedModel(speculate="off").generate("def ", max_tokens=5)
    with pytest.raises(UnsupportedModelError, match="cannot speculate: ") as raised:
        LoadedModel(folder, speculate="on")
    assert sentence in str(raised.value)
    assert LoadedModel(folder, speculate="off").idle_speculation is None


def test_a_layer_of_another_shape_is_not_run(edited: Callable[..., Path]) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}eh_proj.weight"] = tensors[f"{LAYER}eh_proj.weight"][:, :300].contiguous()

    fault = parts_of(edited(narrow)).fault
    assert fault == f"{LAYER}eh_proj.weight has shape [256, 300], but config.json asks for [256, 512]"


def test_a_layer_that_config_json_does_not_announce_is_run_all_the_same(edited: Callable[..., Path]) -> None:
    assert LoadedModel(edited(num_nextn_predict_layers=0)).speculation is not None


def test_memory_for_the_model_alone_turns_it_off() -> None:
    without = LoadedModel(speculate="off", ctx=64)
    least = without.budget.fixed + 8 * without.budget.slot
    tight = LoadedModel(ctx=64, ram=least + (1 << 20))
    assert tight.speculation is None
    assert tight.idle_speculation is not None
    assert tight.idle_speculation.startswith("with the MTP layer this model needs at least ")
    with pytest.raises(ResourceError, match="this model needs at least"):
        LoadedModel(ctx=64, ram=least + (1 << 20), speculate="on")


def test_memory_of_the_layer_is_planned_for() -> None:
    off, on = LoadedModel(speculate="off", ctx=64).budget, LoadedModel(ctx=64).budget
    parts = parts_of(demo.path())
    assert on.dense - off.dense >= parts.bytes_by_kind["dense"]
    assert on.slots == off.slots + 64
    assert on.cache == off.cache * 5 // 4
    assert on.work > off.work
