"""Slices: whole checkpoints that our own tools take, with weights that compute."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent

V3_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "moe_intermediate_size": 136,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 144,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
V2_SIZES = {**V3_SIZES, "q_lora_rank": None}


@pytest.fixture(scope="module")
def tools() -> Iterator[SimpleNamespace]:
    """The modules by name; they stand beside scripts and find each other by bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("layouts", "make_slice", "scratch")})


@pytest.fixture
def make(tools: SimpleNamespace, tmp_path: Path) -> Any:
    """Make a tiny slice in several shards; keyword arguments are those of `slice_config` and the seed."""

    def write(name: str = "slice", *, model: str = "v3", seed: int = 0, **options: Any) -> Path:
        config = tools.make_slice.slice_config(
            tools.make_slice.MODELS[model], **{"experts": 32, "vocab": 512, "moe_layers": 2, **options}
        )
        config |= V3_SIZES if model == "v3" else V2_SIZES
        tools.make_slice.make_slice(tmp_path / name, tools.layouts.one_stage(config, limit=900_000), seed=seed)
        return tmp_path / name

    return write


def run(program: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("model", "options"), [("v3", {"mtp": True}), ("v3", {"dense_layers": 0}), ("v2-lite", {})])
def test_our_tools_take_a_slice(make: Any, tmp_path: Path, model: str, options: dict[str, Any]) -> None:
    source, out, result = make(model=model, **options), tmp_path / "out", tmp_path / "logits.safetensors"
    assert len(list(source.glob("*.safetensors"))) > 2
    listed = json.loads(run("manifests", "ls", source, "--match", "*.experts.*.gate_proj.weight", "--json"))
    assert len(listed) == 32 * (3 if "mtp" in options else 2)
    run("reshard", "run", source, out, "-q")
    run("reshard", "restore", out, "--check")
    run("runner", "logits", "-m", out, "--ids", "5,77,300,5,511,0,140,8", "--out", result)
    logits = load_file(result)["logits"]
    assert logits.isfinite().all()
    assert logits.std(1).min() > 0.1
    assert logits.std(1).max() < 10
    assert len(set(logits.argmax(1).tolist())) > 1
    # Positions with the same token differ by what came before.
    assert (logits[0] - logits[3]).abs().max() > 0.01


def test_the_same_options_give_the_same_bytes(make: Any) -> None:
    first = digests(make("first"))
    assert digests(make("second")) == first
    other = digests(make("other", seed=1))
    shards = [name for name in first if name.endswith(".safetensors")]
    assert all(first[name] != other[name] for name in shards)
    assert {name: other[name] for name in first if name not in shards} == {
        name: first[name] for name in first if name not in shards
    }


def test_every_tensor_has_bytes_of_its_own_and_mtp_copies_do_not(make: Any) -> None:
    source = make(mtp=True)
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    copies = {
        "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight": "lm_head.weight",
    }
    for copy, original in copies.items():
        assert torch.equal(tensors[copy], tensors[original])
    kept = [tensor for name, tensor in tensors.items() if name not in copies]
    assert len({tensor.view(torch.uint8).numpy().tobytes() for tensor in kept}) == len(kept)


def test_fp8_weights_are_gaussian_and_fill_their_blocks(make: Any) -> None:
    source = make(mtp=True)
    tensors = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weights = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    assert all(f"{name}_scale_inv" in tensors for name in weights)
    stored = torch.cat([tensors[name].float().flatten() for name in weights])
    assert stored.isfinite().all()
    assert stored.abs().max() == 448
    scale = torch.cat([tensors[f"{name}_scale_inv"].flatten() for name in weights])
    assert scale.min() > 0
    sigma = stored.std()
    assert sigma * scale.mean() == pytest.approx(0.02, rel=0.02)
    # Kurtosis: 3 for a gaussian, 1.8 for a uniform distribution.
    assert (stored / sigma).pow(4).mean() == pytest.approx(3, abs=0.1)
    whole = stored[: stored.numel() // 16384 * 16384].view(-1, 16384)
    assert whole.abs().amax(1).min() > 350


def test_codes_are_the_nearest(tools: SimpleNamespace) -> None:
    values = torch.linspace(-447, 447, 20_011, dtype=torch.float64)
    found = torch.from_numpy(tools.make_slice._e4m3(values.numpy())).view(torch.float8_e4m3fn).double()
    near = values.to(torch.float8_e4m3fn).double()
    assert torch.equal((found - values).abs(), (near - values).abs())
    found = torch.from_numpy(tools.make_slice._bfloat16(values.numpy())).view(torch.bfloat16)
    assert torch.equal(found, values.float().bfloat16())


def test_a_slice_is_v3_but_for_its_counts(tools: SimpleNamespace) -> None:
    config = tools.make_slice.slice_config(tools.layouts.V3_CONFIG, experts=64, mtp=True)
    changed = {key for key in config if config[key] != tools.layouts.V3_CONFIG[key]}
    assert changed == {"num_hidden_layers", "first_k_dense_replace", "n_routed_experts"}
    config = tools.make_slice.slice_config(tools.layouts.V2_LITE_CONFIG)
    assert config == tools.layouts.V2_LITE_CONFIG
    layout = tools.layouts.one_stage(config)
    # The published index has this size, and its shards these payloads.
    assert (layout.tensor_count, len(layout.index)) == (5291, 479_924)
    assert [round(shard.tensors[-1].end / 1e7) for shard in layout.shards] == [859, 859, 859, 564]


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, HERE / "make_slice.py", *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experts", "36"], "n_group is 8, which does not divide n_routed_experts 36"),
        (["--experts", "8"], "n_group is 8, but a group"),
        (["--vocab", "0"], "vocab_size"),
        (["--moe-layers", "0"], "at least one MoE layer"),
        (["--model", "v2-lite", "--mtp"], "only V3 has an MTP layer"),
    ],
)
def test_a_slice_that_nobody_could_run_is_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = command(tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_slice_wants_room_and_a_name_of_its_own(tmp_path: Path) -> None:
    done = command(tmp_path / "out", "--vocab", "2000000000")
    assert done.returncode == 1
    assert "GB free" in done.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    done = command(tmp_path / "out")
    assert done.returncode == 1
    assert "is there already" in done.stderr


def test_nothing_half_made_stays(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        written.append(descriptor)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "full")
        return len(data)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full"):
        make()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_writes_will_do(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, real = digests(make("first")), os.open

    def refuse(path: Any, flags: int, *more: int, **others: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", refuse)
    assert digests(make("second")) == first
