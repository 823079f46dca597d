"""Tiny checkpoints in their published forms, made without torch, and the programs as functions.

Bytes are random (FP8 codes that are NaN included): nothing here computes with them, they must only arrive unchanged.
Every folder of session scope is shared, so it is read-only by agreement, and its teardown checks the agreement.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from safetensors import TensorSpec, serialize_file

from manifests.cli import manifests as manifests_group
from manifests.dtypes import nbytes
from manifests.schema import Selection
from reshard.cli import reshard as reshard_group
from reshard.earlier import find_earlier
from reshard.plan import make_plan
from reshard.progress import Progress
from reshard.run import reshard_checkpoint
from reshard.source import read_source, source_root
from runner.demo.shards import StoredTensor, split, write, write_file

# The same examples on every machine and no clock: a busy machine is no bug.
settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("house")

INDEX = "model.safetensors.index.json"
AUXILIARY = {
    "config.json": "",  # filled in by each builder
    "generation_config.json": '{"temperature": 0.6}',
    "tokenizer.json": '{"version": "1.0", "model": {"type": "BPE"}}',
    "tokenizer_config.json": '{"bos_token": "<\uff5cbegin\u2581of\u2581sentence\uff5c>"}',
    "LICENSE": "Permission is hereby granted\r\nwith odd line ends\r",
    "empty.txt": "",
    "figures/deep/benchmark 1.txt": "a nested folder and a blank in a name",
    ".gitattributes": "*.safetensors filter=lfs",
}
LEFT_OUT = {
    ".cache/huggingface/download/config.json.metadata": "hidden folder",
    "figures/.git/HEAD": "nested hidden folder",
    "pytorch_model.bin": "other weights",
    "consolidated.safetensors": "weights that the index does not name",
}

UNKNOWN = ("model.layers.1.self_attn.mystery.weight", "model.layers.2.gain", "vision_tower.proj.weight")
"""Names outside the grammar that the V3-like checkpoint holds: two in a layer (one a scalar), one outside."""

V3_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 67,
    "hidden_size": 136,
    "intermediate_size": 200,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 11,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
V2_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
KIMI_CONFIG: dict[str, Any] = {
    "model_type": "kimi_k2",
    "hidden_size": 24,
    "num_hidden_layers": 61,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}

Builder = Callable[[Path], Path]


def random_tensor(name: str, dtype: str, *shape: int) -> StoredTensor:
    """Bytes that follow from the name alone."""
    return StoredTensor(name=name, dtype=dtype, shape=shape, data=random.Random(name).randbytes(nbytes(dtype, shape)))


def fp8(prefix: str, rows: int, columns: int) -> list[StoredTensor]:
    """A weight directly followed by its block scales."""
    scale = random_tensor(f"{prefix}.weight_scale_inv", "F32", -(-rows // 128), -(-columns // 128))
    return [random_tensor(f"{prefix}.weight", "F8_E4M3", rows, columns), scale]


def bf16(name: str, *shape: int) -> StoredTensor:
    return random_tensor(name, "BF16", *shape)


def mlp(prefix: str, hidden: int, width: int) -> list[StoredTensor]:
    return [
        *fp8(f"{prefix}.gate_proj", width, hidden),
        *fp8(f"{prefix}.up_proj", width, hidden),
        *fp8(f"{prefix}.down_proj", hidden, width),
    ]


def v3_layer(layer: int, *, moe: bool) -> list[StoredTensor]:
    """One layer in the published order: attention, router, shared expert, routed experts, norms last."""
    c = V3_CONFIG
    prefix, hidden, heads = f"model.layers.{layer}.", c["hidden_size"], c["num_attention_heads"]
    q_rank, kv_rank, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    attention = f"{prefix}self_attn."
    tensors = [
        *fp8(f"{attention}q_a_proj", q_rank, hidden),
        bf16(f"{attention}q_a_layernorm.weight", q_rank),
        *fp8(f"{attention}q_b_proj", heads * (c["qk_nope_head_dim"] + rope), q_rank),
        *fp8(f"{attention}kv_a_proj_with_mqa", kv_rank + rope, hidden),
        bf16(f"{attention}kv_a_layernorm.weight", kv_rank),
        *fp8(f"{attention}kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), kv_rank),
        *fp8(f"{attention}o_proj", hidden, heads * c["v_head_dim"]),
    ]
    if moe:
        tensors += [
            bf16(f"{prefix}mlp.gate.weight", c["n_routed_experts"], hidden),
            random_tensor(f"{prefix}mlp.gate.e_score_correction_bias", "F32", c["n_routed_experts"]),
            *mlp(f"{prefix}mlp.shared_experts", hidden, c["moe_intermediate_size"]),
        ]
        for expert in range(c["n_routed_experts"]):
            tensors += mlp(f"{prefix}mlp.experts.{expert}", hidden, c["moe_intermediate_size"])
    else:
        tensors += mlp(f"{prefix}mlp", hidden, c["intermediate_size"])
    return [
        *tensors,
        bf16(f"{prefix}input_layernorm.weight", hidden),
        bf16(f"{prefix}post_attention_layernorm.weight", hidden),
    ]


def v3_stages() -> list[list[StoredTensor]]:
    """Two pipeline stages: a dense layer, two MoE layers, the MTP layer with its copies, and strange tensors."""
    hidden, vocab = V3_CONFIG["hidden_size"], V3_CONFIG["vocab_size"]
    first = [bf16("model.embed_tokens.weight", vocab, hidden), *v3_layer(0, moe=False), *v3_layer(1, moe=True)]
    first += [bf16(UNKNOWN[0], 5, 3), random_tensor("model.layers.1.mlp.gate.bias", "F32", 0, 7)]
    second = [
        *v3_layer(2, moe=True),
        random_tensor(UNKNOWN[1], "F64"),
        random_tensor(UNKNOWN[2], "U8", 13),
        bf16("model.norm.weight", hidden),
        bf16("lm_head.weight", vocab, hidden),
        *v3_layer(3, moe=True),
        bf16("model.layers.3.enorm.weight", hidden),
        bf16("model.layers.3.hnorm.weight", hidden),
        bf16("model.layers.3.eh_proj.weight", hidden, 2 * hidden),
        bf16("model.layers.3.embed_tokens.weight", vocab, hidden),
        bf16("model.layers.3.shared_head.norm.weight", hidden),
        bf16("model.layers.3.shared_head.head.weight", vocab, hidden),
    ]
    return [first, second]


def write_auxiliary(folder: Path, config: dict[str, Any]) -> None:
    contents = AUXILIARY | LEFT_OUT | {"config.json": json.dumps(config, indent=2)}
    for path, text in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text.encode())


def build_v3(folder: Path) -> Path:
    """DeepSeek-V3's form: 45 shards cut by element count, so pairs and experts lie across boundaries."""
    folder.mkdir(parents=True)
    write(folder, split(v3_stages(), 12_000))
    write_auxiliary(folder, V3_CONFIG)
    return folder


def build_v2(folder: Path) -> Path:
    """DeepSeek-V2-Lite's form: BF16, no q_lora, no MTP, no bias, four shards."""
    folder.mkdir(parents=True)
    hidden = V2_CONFIG["hidden_size"]
    stage = [bf16("model.embed_tokens.weight", 30, hidden)]
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (24, hidden)),
            ("self_attn.kv_a_proj_with_mqa", (12, hidden)),
            ("self_attn.kv_a_layernorm", (8,)),
            ("self_attn.kv_b_proj", (24, 8)),
            ("self_attn.o_proj", (hidden, 12)),
            *([("mlp.gate", (4, hidden))] if layer else []),
        ):
            stage.append(bf16(f"{prefix}{name}.weight", *shape))
        for part in ["mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(4))] if layer else ["mlp"]:
            stage += [bf16(f"{prefix}{part}.{p}_proj.weight", 14, hidden) for p in ("gate", "up")]
            stage.append(bf16(f"{prefix}{part}.down_proj.weight", hidden, 14))
        stage += [bf16(f"{prefix}{norm}_layernorm.weight", hidden) for norm in ("input", "post_attention")]
    stage += [bf16("model.norm.weight", hidden), bf16("lm_head.weight", 30, hidden)]
    write(folder, split([stage], sum(prod(tensor.shape) for tensor in stage) // 4))
    write_auxiliary(folder, V2_CONFIG)
    return folder


def build_single(folder: Path) -> Path:
    """One file without an index, beside nothing but a config."""
    folder.mkdir(parents=True)
    write_file(folder / "model.safetensors", [bf16("model.embed_tokens.weight", 7, 5), *v3_layer(0, moe=False)])
    (folder / "config.json").write_text('{"model_type": "deepseek_v3", "num_hidden_layers": 1}')
    return folder


def build_kimi(folder: Path) -> Path:
    """Kimi-K2's form: one layer a shard, names without zero padding, written by the stock library (sorted by dtype)."""
    folder.mkdir(parents=True)
    weight_map = {}
    for layer in range(61):
        prefix = f"model.layers.{layer}."
        tensors = [
            *fp8(f"{prefix}self_attn.q_a_proj", 9, 24),
            bf16(f"{prefix}self_attn.rotary_emb.inv_freq", 4),
            bf16(f"{prefix}input_layernorm.weight", 24),
        ]
        for part in [f"mlp.experts.{e}" for e in range(2)] if layer else ["mlp"]:
            tensors += mlp(prefix + part, 24, 10)
        tensors += [bf16("model.embed_tokens.weight", 11, 24)] if layer == 0 else []
        tensors += [bf16("model.norm.weight", 24), bf16("lm_head.weight", 11, 24)] if layer == 60 else []
        shard = f"model-{layer + 1}-of-61.safetensors"
        write_stock(folder / shard, tensors)
        weight_map |= {tensor.name: shard for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}))
    (folder / "config.json").write_text(json.dumps(KIMI_CONFIG))
    return folder


_STOCK_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F32": "float32", "BF16": "bfloat16"}


def write_stock(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """Write with the safetensors library itself."""
    buffers = {tensor.name: ctypes.create_string_buffer(tensor.data, len(tensor.data)) for tensor in tensors}
    specs = {
        tensor.name: TensorSpec(
            dtype=_STOCK_DTYPES[tensor.dtype],
            shape=list(tensor.shape),
            data_ptr=ctypes.addressof(buffers[tensor.name]),
            data_len=len(tensor.data),
        )
        for tensor in tensors
    }
    serialize_file(specs, path, {"format": "pt"})


def tree(root: Path) -> dict[str, str]:
    """Every file, link and folder below root with a digest of what it is."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder) / name
            if path.is_symlink():
                what = f"link to {path.readlink()}"
            elif path.is_dir():
                what = "folder"
            elif path.is_file():
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                what = "special"
            found[path.relative_to(root).as_posix()] = what
    return found


def stamps(root: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of everything below root and of root: what any writing would touch."""
    paths = [root, *(Path(folder) / name for folder, folders, files in os.walk(root) for name in folders + files)]
    return {
        str(path): (status.st_ino, status.st_size, status.st_ctime_ns) for path in paths if (status := path.lstat())
    }


def shared(folder: Path) -> Iterator[Path]:
    before = tree(folder)
    yield folder
    assert tree(folder) == before, f"a test changed the shared {folder.name}"


def reshard_folder(
    source: Path, destination: Path, selection: Selection | None = None, jobs: int = 2, **options: bool
) -> Path:
    earlier = find_earlier(source_root(source), destination)
    found = read_source(source, earlier.freed)
    with Progress(0, label="", quiet=True) as progress:
        plan = make_plan(found, earlier.widen(selection or Selection()))
        reshard_checkpoint(found, plan, destination, jobs=jobs, progress=progress, **options)
    return destination


@pytest.fixture(scope="session", autouse=True)
def _fsync_takes_no_time() -> Iterator[None]:
    """On a busy disk one fsync may take longer than a test. That it is called, and when, is what tests can see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def v3_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from shared(build_v3(tmp_path_factory.mktemp("checkpoints") / "v3"))


@pytest.fixture(scope="session")
def v2_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from shared(build_v2(tmp_path_factory.mktemp("checkpoints") / "v2"))


@pytest.fixture(scope="session")
def single_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from shared(build_single(tmp_path_factory.mktemp("checkpoints") / "single"))


@pytest.fixture(scope="session")
def kimi_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from shared(build_kimi(tmp_path_factory.mktemp("checkpoints") / "kimi"))


@pytest.fixture(scope="session")
def v3_resharded(tmp_path_factory: pytest.TempPathFactory, v3_folder: Path) -> Iterator[Path]:
    yield from shared(reshard_folder(v3_folder, tmp_path_factory.mktemp("resharded") / "v3"))


@pytest.fixture
def v3_copy(tmp_path: Path, v3_folder: Path) -> Path:
    """The V3-like checkpoint, to be damaged."""
    return shutil.copytree(v3_folder, tmp_path / "v3")


@pytest.fixture
def resharded_copy(tmp_path: Path, v3_resharded: Path) -> Path:
    """The resharded V3-like checkpoint, to be damaged."""
    return shutil.copytree(v3_resharded, tmp_path / "resharded")


@pytest.fixture(scope="session")
def v3_bytes() -> dict[str, bytes]:
    """The bytes of every tensor of the V3-like checkpoint, by name."""
    return {tensor.name: tensor.data for stage in v3_stages() for tensor in stage}


@pytest.fixture(scope="session", name="tree")
def tree_fixture() -> Callable[[Path], dict[str, str]]:
    return tree


@pytest.fixture(scope="session", name="stamps")
def stamps_fixture() -> Callable[[Path], dict[str, tuple[int, int, int]]]:
    return stamps


@pytest.fixture(scope="session", name="reshard_folder")
def reshard_folder_fixture() -> Callable[..., Path]:
    return reshard_folder


@pytest.fixture(scope="session", name="write_shards")
def write_shards_fixture() -> Callable[[Path, Sequence[Sequence[StoredTensor]]], Path]:
    """Write shards of given tensors, an index and a config into a new folder."""

    def build(folder: Path, shards: Sequence[Sequence[StoredTensor]]) -> Path:
        folder.mkdir(parents=True)
        write(folder, shards)
        (folder / "config.json").write_text('{"model_type": "deepseek_v3", "num_hidden_layers": 3}')
        return folder

    return build


@pytest.fixture(scope="session", name="random_tensor")
def random_tensor_fixture() -> Callable[..., StoredTensor]:
    return random_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a program ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def deadline() -> Iterator[None]:
    """End a test that hangs: whoever opens a FIFO without asking would wait for ever."""

    def ring(*_: object) -> None:
        raise TimeoutError("still waiting after 20 seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """Run a command of `manifests` or `reshard` in this process, its error boundary included."""
    groups = {"manifests": manifests_group, "reshard": reshard_group}
    handler = signal.getsignal(signal.SIGTERM)

    def run(name: str, *args: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            groups[name].main([str(arg) for arg in args], prog_name=name)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(code=ended.value.code, out=out, err=err)

    yield run
    signal.signal(signal.SIGTERM, handler)
