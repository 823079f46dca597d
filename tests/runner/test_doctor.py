"""What the doctor finds, and with which exit code."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from reshard.cli import reshard
from runner import demo, kernels
from runner.doctor import Report, examine


def problems(report: Report) -> list[tuple[str, int]]:
    return [(problem.topic, problem.exit_code) for problem in report.problems]


def test_a_sound_checkpoint_can_run(tiny_checkpoint: Path) -> None:
    report = examine(tiny_checkpoint)
    assert (report.exit_code, report.problems, report.notes) == (0, (), ())
    model = report.model
    assert (model.layout, model.model_type, model.files, model.vocab_size) == ("in_place", "deepseek_v3", 2, 300)
    assert model.file_bytes == sum(path.stat().st_size for path in tiny_checkpoint.glob("*.safetensors"))
    assert (model.tokenizer_ids, model.eos_ids, model.chat_template, model.thinking) == (266, (1,), True, False)
    assert model.sampling == {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    assert report.machine.cores >= 1
    assert report.threads is not None
    assert None not in report.packages.values()


def test_the_document_has_the_promised_keys(tiny_checkpoint: Path) -> None:
    document = json.loads(json.dumps(examine(tiny_checkpoint).to_document()))
    assert list(document) == ["can_run", "exit_code", "machine", "packages", "model", "forecast", "problems", "notes"]
    assert list(document["machine"]) == [
        "system",
        "cpu",
        "features",
        "cores",
        "memory_bytes",
        "available_bytes",
        "threads",
        "kernels",
    ]
    assert list(document["packages"]) == ["python", "torch", "safetensors", "tokenizers", "jinja2", "tqdm"]
    assert list(document["model"]) == [
        "path",
        "embedded",
        "layout",
        "model_type",
        "files",
        "file_bytes",
        "vocab_size",
        "tokenizer_ids",
        "eos_ids",
        "chat_template",
        "thinking",
        "sampling",
    ]


def test_problems_have_the_promised_keys(tmp_path: Path) -> None:
    (problem,) = examine(tmp_path / "absent").to_document()["problems"]
    assert list(problem) == ["topic", "message", "exit_code"]


def test_the_lines_for_people(tiny_checkpoint: Path) -> None:
    lines = list(examine(tiny_checkpoint).lines())
    assert [line.split()[0] for line in lines] == [
        "machine",
        "products",
        "features",
        "memory",
        "packages",
        "model",
        "deepseek_v3,",
        "tokenizer",
        "sampling",
        "budget",
        "rates",
        "a",
        "at",
        "advice",
        "can",
    ]
    assert lines[-1] == "can run    yes"


def test_what_does_the_products_is_said(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    active = kernels.active()
    report = examine(tiny_checkpoint)
    assert report.kernels == (active and active.variant)
    monkeypatch.setattr(kernels, "active", lambda: None)
    report = examine(tiny_checkpoint)
    assert report.kernels is None
    assert "products   PyTorch, a hundred times slower" in "\n".join(report.lines())


def test_nothing_there(tmp_path: Path) -> None:
    report = examine(tmp_path / "absent")
    assert problems(report) == [("checkpoint", 10)]
    assert list(report.lines())[-1] == "can run    no"


def test_the_embedded_model_is_the_default(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "path", lambda: tiny_checkpoint)
    report = examine(None)
    assert (report.exit_code, report.model.embedded, report.model.path) == (0, True, str(tiny_checkpoint))


def test_an_unsupported_model(tiny_copy: Path, change: Callable[..., None]) -> None:
    change(tiny_copy, "config.json", model_type="deepseek_v4")
    assert problems(examine(tiny_copy)) == [("config", 14)]


def test_every_fault_is_found_and_the_first_decides(tiny_copy: Path, change: Callable[..., None]) -> None:
    change(tiny_copy, "config.json", model_type="deepseek_v4")
    change(tiny_copy, "generation_config.json", do_sample=True, temperature=-1)
    (tiny_copy / "tokenizer.json").unlink()
    report = examine(tiny_copy)
    assert problems(report) == [("config", 14), ("tokenizer", 10), ("sampling", 12)]
    assert report.exit_code == 14


def test_missing_tensors(tiny_copy: Path, change: Callable[..., None]) -> None:
    change(tiny_copy, "config.json", num_hidden_layers=5)
    report = examine(tiny_copy)
    assert problems(report) == [("tensors", 12)]
    assert "model.layers.3.self_attn.q_a_proj.weight" in report.problems[0].message


def test_a_tensor_of_another_shape(tiny_copy: Path, change: Callable[..., None]) -> None:
    change(tiny_copy, "config.json", moe_intermediate_size=96)
    report = examine(tiny_copy)
    assert problems(report) == [("tensors", 13)]
    assert "config.json asks for [" in report.problems[0].message
    assert report.forecast is None


def test_a_missing_shard(tiny_copy: Path) -> None:
    (tiny_copy / "model-00002-of-000002.safetensors").unlink()
    assert problems(examine(tiny_copy)) == [("checkpoint", 10)]


def test_a_truncated_shard(tiny_copy: Path) -> None:
    shard = tiny_copy / "model-00002-of-000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert problems(examine(tiny_copy)) == [("checkpoint", 12)]


def reshard_to(folder: Path, source: Path, *options: str) -> Path:
    result = CliRunner().invoke(reshard, ["run", str(source), str(folder), "--quiet", *options])
    assert result.exit_code == 0, result.output
    return folder


def test_a_resharded_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = reshard_to(tmp_path / "experts", tiny_checkpoint)
    report = examine(folder)
    assert (report.exit_code, report.model.layout) == (0, "resharded")
    expert = folder / "layers" / "1" / "experts" / "3.safetensors"
    expert.write_bytes(expert.read_bytes() + b"x")
    assert problems(examine(folder)) == [("files", 13)]
    expert.unlink()
    report = examine(folder)
    assert problems(report) == [("files", 3)]
    assert "layers/1/experts/3.safetensors" in report.problems[0].message


def test_the_forecast_counts_what_experts_hold_and_not_the_room_they_get(tiny_checkpoint: Path, tmp_path: Path) -> None:
    expert = 3 * 40 * 72 * 2  # three matrices of bfloat16; two experts in each of two layers are a token's
    for folder in (tiny_checkpoint, reshard_to(tmp_path / "experts", tiny_checkpoint)):
        found = examine(folder).forecast
        assert found is not None
        assert found.budget.slot > found.budget.expert == expert
        assert found.routed_bytes == 2 * 2 * expert


def test_a_part_of_a_checkpoint_is_incomplete(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = examine(reshard_to(tmp_path / "part", tiny_checkpoint, "--experts", "0-5"))
    assert problems(report) == [("tensors", 3)]
    assert "12 tensors" in report.problems[0].message  # three matrices of two experts in two layers


def test_a_tokenizer_of_another_model(tiny_copy: Path, change: Callable[..., None]) -> None:
    change(tiny_copy, "config.json", vocab_size=200)
    assert ("tokenizer", 12) in problems(examine(tiny_copy))


def test_what_may_surprise_is_noted(tiny_copy: Path, change: Callable[..., None]) -> None:
    change(tiny_copy, "config.json", eos_token_id=None)
    change(tiny_copy, "tokenizer_config.json", chat_template=None, eos_token=None)
    report = examine(tiny_copy)
    assert report.problems == ()
    assert [note.split(":")[0] for note in report.notes] == ["no chat template", "no end-of-text token is named"]


def test_a_missing_package(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_tokenizers(name: str) -> str:
        if name == "tokenizers":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_tokenizers)
    report = examine(tiny_checkpoint)
    assert problems(report) == [("packages", 1)]
    assert report.packages["tokenizers"] is None
