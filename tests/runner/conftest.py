"""A small byte-level tokenizer and a tiny checkpoint in the published form, for tests of text and commands."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from runner import kernels
from runner.cli import runner as runner_group

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% else %}{{ '" + ASSISTANT + "' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
"""V3's form: no blanks, control tokens only."""

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 72,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def build_tokenizer() -> Tokenizer:
    """BOS, EOS, padding, 256 bytes, two merges, then `<think>` as text-like tokens and two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([BOS, EOS, PAD, *alphabet, "he", "hell"])}
    vocab["ll"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l"), ("he", "ll")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (BOS, EOS, PAD)])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ("<think>", "</think>")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (USER, ASSISTANT)])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The small tokenizer itself."""
    return build_tokenizer()


@pytest.fixture
def text_folder(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Write a folder with tokenizer.json and the small files beside it; keyword arguments become the files."""

    def write(
        *,
        config: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
        tokenizer_config: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / "text"
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        documents = {
            "config.json": config,
            "generation_config.json": generation_config,
            "tokenizer_config.json": tokenizer_config,
        }
        for name, document in documents.items():
            if document is not None:
                (folder / name).write_text(json.dumps(document), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model of random BF16 weights in two shards, with index, configs, tokenizer and template."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tensors = _tensors(CONFIG)
    names = list(tensors)
    half = len(names) // 2
    shards = {"model-00001-of-000002.safetensors": names[:half], "model-00002-of-000002.safetensors": names[half:]}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / shard, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: shard for shard, inside in shards.items() for name in inside},
    }
    tokenizer_config = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": BOS},
        "eos_token": {"__type": "AddedToken", "content": EOS},
        "chat_template": TEMPLATE,
    }
    documents = {
        "model.safetensors.index.json": index,
        "config.json": CONFIG,
        "tokenizer_config.json": tokenizer_config,
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    build_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        # Wide enough that the best token is clearly the best, and sampling has something to choose from.
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5 * 1.5).to(dtype)

    def ones(size: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(size, generator=generator)).to(torch.bfloat16)

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_rank, kv_rank, experts = config["q_lora_rank"], config["kv_lora_rank"], config["n_routed_experts"]
    tensors = {"model.embed_tokens.weight": weight(config["vocab_size"], hidden) * 4}

    def mlp(prefix: str, width: int) -> None:
        tensors[f"{prefix}.gate_proj.weight"] = weight(width, hidden)
        tensors[f"{prefix}.up_proj.weight"] = weight(width, hidden)
        tensors[f"{prefix}.down_proj.weight"] = weight(hidden, width)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        tensors[f"{attention}.q_a_proj.weight"] = weight(q_rank, hidden)
        tensors[f"{attention}.q_a_layernorm.weight"] = ones(q_rank)
        tensors[f"{attention}.q_b_proj.weight"] = weight(heads * (nope + rope), q_rank)
        tensors[f"{attention}.kv_a_proj_with_mqa.weight"] = weight(kv_rank + rope, hidden)
        tensors[f"{attention}.kv_a_layernorm.weight"] = ones(kv_rank)
        tensors[f"{attention}.kv_b_proj.weight"] = weight(heads * (nope + value), kv_rank)
        tensors[f"{attention}.o_proj.weight"] = weight(hidden, heads * value)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{prefix}.mlp", config["intermediate_size"])
        else:
            tensors[f"{prefix}.mlp.gate.weight"] = weight(experts, hidden)
            tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = weight(experts, dtype=torch.float32) * 0.1
            mlp(f"{prefix}.mlp.shared_experts", config["moe_intermediate_size"])
            for expert in range(experts):
                mlp(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
        tensors[f"{prefix}.input_layernorm.weight"] = ones(hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = ones(hidden)
    tensors["model.norm.weight"] = ones(hidden)
    tensors["lm_head.weight"] = weight(config["vocab_size"], hidden)
    return tensors


@pytest.fixture
def tiny_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed or damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


@pytest.fixture
def change() -> Callable[..., None]:
    """Change keys of a JSON document in a folder; write it if there is none."""

    def write(folder: Path, name: str, **values: Any) -> None:
        path = folder / name
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(old | values), encoding="utf-8")

    return write


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder that is gone behind the test, in memory where that can be: there nobody waits for a busy disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def call() -> Callable[..., Result]:
    """Run a command of `runner` in this process; keyword arguments are environment variables, but stdin."""

    def invoke(*arguments: str | Path, stdin: str | bytes | None = None, **environment: str) -> Result:
        return CliRunner().invoke(runner_group, [str(one) for one in arguments], input=stdin, env=environment)

    return invoke


@pytest.fixture
def document(call: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    """Run a command with ``--json`` and give its document."""

    def invoke(*arguments: str | Path, stdin: str | None = None) -> dict[str, Any]:
        result = call(*arguments, "--json", stdin=stdin)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    return invoke


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen[bytes]]:
    """Start a command of `runner` in a process of its own, stderr in a pipe; keyword arguments are streams."""

    def start(*arguments: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "runner", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **streams)

    return start


# ---- the runner's mathematics: plain oracles and tiny random models, from tests/reference ----


def _load_reference(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "reference" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference() -> SimpleNamespace:
    """The oracles of tests/reference, and ``tiny``, models to run them on."""
    names = ("attention", "deepseek", "fp8", "huggingface", "tiny")
    return SimpleNamespace(**{name: _load_reference(name) for name in names})


@pytest.fixture(scope="session")
def tiny_configs(reference: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """One config.json per family: v3, kimi, moonlight, v2_lite, v2."""
    configs: dict[str, dict[str, Any]] = reference.tiny.CONFIGS
    return configs


@pytest.fixture(scope="session")
def tiny_weights(reference: SimpleNamespace) -> Callable[[str], dict[str, torch.Tensor]]:
    """Give the stored tensors of a tiny model by family; made once, not to be changed."""

    @functools.cache
    def weights(name: str) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = reference.tiny.make_weights(
            reference.tiny.CONFIGS[name], reference.fp8.quantize
        )
        return made

    return weights


@pytest.fixture(scope="session")
def tiny_mtp_weights(
    reference: SimpleNamespace, tiny_weights: Callable[[str], dict[str, torch.Tensor]]
) -> Callable[[str], dict[str, torch.Tensor]]:
    """The same with an MTP layer behind them."""

    @functools.cache
    def weights(name: str) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = reference.tiny.make_mtp_weights(
            reference.tiny.CONFIGS[name], reference.fp8.quantize
        )
        return tiny_weights(name) | made

    return weights


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernels could not be built."""
    monkeypatch.setattr(kernels, "active", lambda: None)


@pytest.fixture(params=["torch", *kernels.supported()])
def every_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by torch, and by each instruction set that is here."""
    library, chosen = kernels.library(), None
    if request.param != "torch":
        assert library is not None
        chosen = kernels.Kernels(library, request.param)
    monkeypatch.setattr(kernels, "active", lambda: chosen)
