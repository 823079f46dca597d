"""Routing traces: what a recorder makes of a run, canonical files, and documents that lie."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from manifests.errors import ManifestError, SourceNotFoundError
from runner import trace as traces
from runner.loaded import LoadedModel
from runner.trace import Pass, Trace, TraceRecorder, load, parse, save

Call = Callable[..., Result]
Document = Callable[..., dict[str, Any]]

DOCUMENT: dict[str, Any] = {
    "format": "expert-trace",
    "version": 1,
    "model_type": "deepseek_v3",
    "layers": [3, 4],
    "experts": 8,
    "experts_per_token": 2,
    "passes": [
        {"tokens": 2, "experts": {"3": [1, 2, 5], "4": [0, 7]}},
        {"tokens": 1, "experts": {"3": [1, 6], "4": [0, 3]}},
    ],
    "usage": {"3": {"1": 2, "2": 1, "5": 2, "6": 1}, "4": {"0": 3, "3": 1, "7": 2}},
}
TRACE = Trace(
    model_type="deepseek_v3",
    layers=(3, 4),
    experts=8,
    experts_per_token=2,
    passes=(
        Pass(tokens=2, experts={3: (1, 2, 5), 4: (0, 7)}),
        Pass(tokens=1, experts={3: (1, 6), 4: (0, 3)}),
    ),
    usage={3: {1: 2, 2: 1, 5: 2, 6: 1}, 4: {0: 3, 3: 1, 7: 2}},
)


@pytest.fixture
def recorder() -> TraceRecorder:
    return TraceRecorder(model_type="deepseek_v3", layers=range(3, 5), experts=8, experts_per_token=2)


def observe(recorder: TraceRecorder, layer: int, *tokens: list[int]) -> None:
    recorder.observe(layer, torch.tensor(tokens))


def test_a_recorder_counts_passes_and_uses(recorder: TraceRecorder) -> None:
    observe(recorder, 3, [1, 5], [2, 5])
    observe(recorder, 4, [0, 7], [0, 7])
    observe(recorder, 3, [1, 6])
    observe(recorder, 4, [0, 3])
    assert recorder.trace() == TRACE


def test_an_interrupted_pass_is_left_out(recorder: TraceRecorder) -> None:
    observe(recorder, 3, [4, 7])
    observe(recorder, 3, [1, 5], [2, 5])
    observe(recorder, 4, [0, 7], [0, 7])
    observe(recorder, 3, [1, 6])
    observe(recorder, 4, [0, 3])
    observe(recorder, 3, [2, 4])
    assert recorder.trace() == TRACE


def test_a_file_is_canonical_and_comes_back(tmp_path: Path) -> None:
    save(TRACE, tmp_path / "a.json")
    raw = (tmp_path / "a.json").read_bytes()
    assert raw == json.dumps(DOCUMENT, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    assert load(tmp_path / "a.json") == TRACE
    save(load(tmp_path / "a.json"), tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == raw
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_run_without_a_pass_has_a_trace(recorder: TraceRecorder, tmp_path: Path) -> None:
    save(recorder.trace(), tmp_path / "a.json")
    assert load(tmp_path / "a.json").passes == ()


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("format", "expert-map", "format must be 'expert-trace'"),
        ("format", None, "format must be"),
        ("version", 2, "version must be 1"),
        ("version", True, "version must be 1"),
        ("version", 1.0, "version must be 1"),
        ("model_type", 3, "model_type must be a string"),
        ("layers", {}, "layers must be a list"),
        ("layers", [], "layers must not be empty"),
        ("layers", [4, 3], "layers must hold whole numbers from 0 to 2147483647, ascending"),
        ("layers", [3, 3], "ascending"),
        ("layers", [-1, 3], "ascending"),
        ("layers", [3, 2**31], "ascending"),
        ("layers", [3, True], "ascending"),
        ("layers", [3, 4, 5], "passes[0].experts lacks 5"),
        ("layers", [3], "passes[0].experts has '4', which does not belong there"),
        ("experts", 0, "experts must be a whole number from 1"),
        ("experts", 10**30, "experts must be a whole number"),
        ("experts", "8", "experts must be a whole number"),
        ("experts", 6, "passes[0].experts.4 must hold whole numbers from 0 to 5"),
        ("experts_per_token", 9, "experts_per_token must be a whole number from 1 to 8"),
        ("experts_per_token", 3, "passes[0].experts.4 has 2 experts, which 2 tokens cannot have used"),
        ("passes", None, "passes must be a list"),
        ("passes.0", 7, "passes[0] must be an object"),
        ("passes.0.tokens", 0, "passes[0].tokens must be a whole number from 1"),
        ("passes.0.tokens", 1, "passes[0].experts.3 has 3 experts, which 1 tokens cannot have used"),
        ("passes.0.tokens", 3, "usage.3 does not sum to the 8 choices"),
        ("passes.0.more", 3, "passes[0] has 'more', which does not belong there"),
        ("passes.0.experts", [], "passes[0].experts must be an object"),
        ("passes.0.experts.3", [1, 2, 8], "passes[0].experts.3 must hold whole numbers from 0 to 7"),
        ("passes.0.experts.3", [1, -2], "passes[0].experts.3 must hold"),
        ("passes.0.experts.3", [1, 1], "passes[0].experts.3 must hold"),
        ("passes.0.experts.3", [1, 2.0], "passes[0].experts.3 must hold"),
        ("passes.0.experts.3", [1, [2]], "passes[0].experts.3 must hold"),
        ("passes.0.experts.3", "12", "passes[0].experts.3 must be a list"),
        ("passes.0.experts.3", [1], "cannot have used"),
        ("passes.0.experts.3", [1, 2], "usage.3 has '5'"),
        ("usage", [], "usage must be an object"),
        ("usage.3", [], "usage.3 must be an object"),
        ("usage.5", {}, "usage has '5'"),
        ("usage.3.7", 1, "usage.3 has '7'"),
        ("usage.3.1", 1, "usage.3.1 must be a whole number from 2"),
        ("usage.3.1", 2**40, "usage.3.1 must be a whole number"),
        ("usage.3.1", 3, "usage.3 does not sum to the 6 choices"),
        ("more", 1, "has 'more'"),
    ],
)
def test_documents_that_lie_are_refused_with_the_place(tmp_path: Path, place: str, value: Any, said: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    *way, last = place.split(".")
    inside: Any = document
    for step in way:
        inside = inside[int(step) if isinstance(inside, list) else step]
    inside[int(last) if isinstance(inside, list) else last] = value
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ManifestError) as caught:
        load(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("key", [key for key in DOCUMENT if key not in ("format", "version")])
def test_what_is_missing_is_named(key: str) -> None:
    document = {name: value for name, value in DOCUMENT.items() if name != key}
    with pytest.raises(ManifestError, match=f"^it lacks {key}$"):
        parse(document, what="it")


@pytest.mark.parametrize("document", [None, 3, "text", [], [DOCUMENT]])
def test_what_is_no_object_is_refused(document: object) -> None:
    with pytest.raises(ManifestError, match=r"^it must be an object$"):
        parse(document, what="it")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'{"format":1,"format":2}', b"[" * 100_000, b'{"version":NaN}'])
def test_what_is_no_strict_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "trace.json").write_bytes(raw)
    with pytest.raises(ManifestError):
        load(tmp_path / "trace.json")


def test_a_file_that_was_cut_is_to_be_made_again(recorder: TraceRecorder, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    save(recorder.trace(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ManifestError, match=r"trace\.json: .*; make it again with `runner trace`"):
        load(path)


def test_a_file_beyond_all_sizes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(TRACE, tmp_path / "trace.json")
    monkeypatch.setattr(traces, "MAX_TRACE_BYTES", 100)
    with pytest.raises(ManifestError, match="larger than 100 bytes"):
        load(tmp_path / "trace.json")
    with pytest.raises(SourceNotFoundError):
        load(tmp_path / "other.json")


# --- the command ---


def test_the_command_writes_what_the_model_did(tiny_checkpoint: Path, tmp_path: Path, document: Document) -> None:
    out = tmp_path / "trace.json"
    said = document("trace", "-m", tiny_checkpoint, "-p", "hello", "-n", "5", "--out", out)
    found = load(out)
    assert (found.model_type, found.layers, found.experts, found.experts_per_token) == ("deepseek_v3", (1, 2), 8, 2)
    loaded = LoadedModel(tiny_checkpoint)
    ids = loaded.text.encode("hello")
    assert [one.tokens for one in found.passes] == [len(ids), 1, 1, 1, 1]
    used: list[dict[int, set[int]]] = []

    def look(layer: int, expert_ids: torch.Tensor) -> None:
        if layer == 1:
            used.append({})
        used[-1][layer] = set(expert_ids.flatten().tolist())

    loaded.model.observer = look
    tokens = list(loaded.engine.generate(ids, max_tokens=5, sampling=loaded.sampling(), eos_ids=loaded.text.eos_ids))
    assert [{layer: set(each) for layer, each in one.experts.items()} for one in found.passes] == used
    assert said == {
        "out": str(out),
        "prompt_tokens": len(ids),
        "generated_tokens": len(tokens),
        "passes": 5,
        "experts_used": {str(layer): len(counts) for layer, counts in found.usage.items()},
    }


def test_the_same_run_writes_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path, call: Call) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("hello")
    for name, source in (("a", ("-p", "hello")), ("b", ("-f", prompt))):
        result = call("trace", "-m", tiny_checkpoint, *source, "-n", "4", "--out", tmp_path / name)
        assert result.exit_code == 0
        assert result.stdout == ""
        assert "4 passes" in result.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    quiet = call("trace", "-m", tiny_checkpoint, "-p", "hello", "-n", "1", "-q", "--out", tmp_path / "c")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_a_full_context_ends_a_trace(tiny_checkpoint: Path, tmp_path: Path, document: Document) -> None:
    prompt = LoadedModel(tiny_checkpoint).text.encode("hello")
    out = tmp_path / "trace.json"
    said = document(
        "trace", "-m", tiny_checkpoint, "-p", "hello", "-n", "9", "--ctx", str(len(prompt) + 1), "--out", out
    )
    assert said["generated_tokens"] == 2
    assert len(load(out).passes) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--out", "x"], 2, "either -p TEXT or -f FILE"),
        (["-p", "a", "-f", "b", "--out", "x"], 2, "either -p TEXT or -f FILE"),
        (["-p", "a"], 2, "--out"),
        (["-p", "a", "--out", "no/such/x"], 10, "no such folder"),
        (["-p", "a", "--out", "."], 2, "is a folder"),
        (["-f", "none.txt", "--out", "x"], 10, "no such file"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("trace", *arguments)
    assert (result.exit_code, said in result.stderr) == (code, True), result.output
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_experts_has_no_trace(
    tiny_copy: Path, tmp_path: Path, call: Call, change: Callable[..., None]
) -> None:
    change(tiny_copy, "config.json", first_k_dense_replace=3)
    result = call("trace", "-m", tiny_copy, "-p", "a", "--out", tmp_path / "x")
    assert result.exit_code == 1
    assert "no MoE layer" in result.stderr
