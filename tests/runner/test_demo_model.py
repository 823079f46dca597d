"""The embedded checkpoint: its published form, how it is cut, and that it has learned what it should."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from manifests.header import HeaderTensor, read_header
from runner import demo
from runner.demo import corpus
from runner.demo.dataset import tokenize
from runner.demo.evaluate import evaluate
from runner.demo.export import load_checkpoint
from runner.demo.network import Network
from runner.demo.parts import NetworkConfig

SCALE = "_scale_inv"
BF16_ENDINGS = ("mlp.gate.weight", "embed_tokens.weight", "head.weight", "eh_proj.weight")
MTP = 4


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo.path()


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module")
def shards(folder: Path) -> dict[str, tuple[HeaderTensor, ...]]:
    """Shard name to its tensors, in order."""
    return {path.name: read_header(path).tensors for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def tensors(shards: dict[str, tuple[HeaderTensor, ...]]) -> dict[str, HeaderTensor]:
    return {tensor.name: tensor for shard in shards.values() for tensor in shard}


@pytest.fixture(scope="module")
def weight_map(folder: Path) -> dict[str, str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    result: dict[str, str] = index["weight_map"]
    return result


def test_163_shards_in_at_most_24_megabytes(folder: Path, shards: dict[str, tuple[HeaderTensor, ...]]) -> None:
    assert list(shards) == [f"model-{number:05d}-of-000163.safetensors" for number in range(1, 164)]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 24_000_000


def test_the_stock_library_opens_every_shard_and_finds_what_the_index_says(
    folder: Path, weight_map: dict[str, str], tensors: dict[str, HeaderTensor]
) -> None:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the library's object is no mapping
                found[name] = path.name
                assert list(file.get_tensor(name).shape) == list(tensors[name].shape)
    assert found == weight_map


def test_headers_are_as_published(folder: Path, shards: dict[str, tuple[HeaderTensor, ...]]) -> None:
    first_bytes = set()
    for name in shards:
        raw = read_header(folder / name).raw
        assert raw[8:].startswith(b'{"__metadata__":{"format":"pt"},"')
        assert raw.endswith(b"}}")  # no padding
        first_bytes.add(len(raw) % 4)
    assert first_bytes == {0, 1, 2, 3}


def test_total_size_is_two_bytes_an_element(folder: Path, tensors: dict[str, HeaderTensor]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": 2 * sum(_elements(tensor) for tensor in tensors.values())}


def test_every_weight_is_directly_followed_by_its_scale(shards: dict[str, tuple[HeaderTensor, ...]]) -> None:
    order = [tensor for shard in shards.values() for tensor in shard]
    fp8 = 0
    for tensor, following in pairwise(order):
        if tensor.dtype == "F8_E4M3":
            fp8 += 1
            assert following.name == tensor.name + SCALE
            assert following.shape == tuple(-(-size // 128) for size in tensor.shape)
    assert fp8 == 5 * 5 + 3 + 4 * 3 * 65  # attention, dense layer, shared and routed experts
    assert len(order) == 2 * fp8 + 5 * 4 + 4 * 2 + 3 + 6  # norms, routers, the model's own three, the MTP layer's six


def test_dtypes_are_as_published(tensors: dict[str, HeaderTensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith((SCALE, "e_score_correction_bias")):
            expected = "F32"
        elif "norm" in name or name.endswith(BF16_ENDINGS):
            expected = "BF16"
        else:
            expected = "F8_E4M3"
        assert tensor.dtype == expected, name


def test_the_mtp_layer_has_copies_of_embedding_and_head(folder: Path, weight_map: dict[str, str]) -> None:
    def raw(name: str) -> Tensor:
        return _load(folder, weight_map, name).view(torch.uint8)

    mtp = f"model.layers.{MTP}."
    assert torch.equal(raw(f"{mtp}embed_tokens.weight"), raw("model.embed_tokens.weight"))
    assert torch.equal(raw(f"{mtp}shared_head.head.weight"), raw("lm_head.weight"))
    assert not torch.equal(raw(f"{mtp}shared_head.norm.weight"), raw("model.norm.weight"))


def test_experts_and_scales_lie_across_shard_boundaries(weight_map: dict[str, str]) -> None:
    parts = defaultdict(set)
    for name, file in weight_map.items():
        if ".mlp.experts." in name:
            parts[name.split(".mlp.experts.")[0], name.split(".")[5]].add(file)
    assert len(parts) == 4 * 64
    assert 10 <= sum(len(files) > 1 for files in parts.values()) < len(parts)
    assert max(len(files) for files in parts.values()) == 2
    apart = [name for name, file in weight_map.items() if weight_map.get(name + SCALE, file) != file]
    assert len(apart) >= 100


def test_config_has_the_architecture_and_ragged_blocks(
    config: dict[str, Any], tensors: dict[str, HeaderTensor]
) -> None:
    assert config["model_type"] == "deepseek_v3"
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")
    assert (config["n_group"], config["n_routed_experts"], config["num_experts_per_tok"]) == (8, 64, 8)
    assert (config["n_shared_experts"], config["num_nextn_predict_layers"]) == (1, 1)
    assert config["num_hidden_layers"] - config["first_k_dense_replace"] >= 3
    assert config["rope_scaling"]["type"] == "yarn"
    assert config["q_lora_rank"] > 0
    assert config["kv_lora_rank"] > 0
    matrices = [tensor.shape for tensor in tensors.values() if tensor.dtype == "F8_E4M3"]
    assert any(rows > 128 and rows % 128 for rows, _ in matrices)
    assert any(columns > 128 and columns % 128 for _, columns in matrices)


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return 12345\n", "caf\u00e9 \u4f60\u597d \U0001f30d\x00\r\n\t ", "<think>"]
)
def test_the_tokenizer_gives_any_text_back(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert max(ids) < 4096


def test_special_tokens_are_deepseeks(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.encode("<\uff5cbegin\u2581of\u2581sentence\uff5c>").ids == [0]
    assert tokenizer.encode("<\uff5cend\u2581of\u2581sentence\uff5c>").ids == [1]
    assert tokenizer.encode("<\uff5c\u2581pad\u2581\uff5c>").ids == [2]
    assert len(tokenizer.encode("<\uff5cUser\uff5c><\uff5cAssistant\uff5c><think></think><|EOT|>").ids) == 5
    assert tokenizer.encode("2024").tokens == ["202", "4"]  # digits in threes


def test_it_predicts_text_that_it_has_never_seen(folder: Path) -> None:
    """A part of the held-out text, on the network that was trained; the whole is measured when it is trained."""
    network = Network(NetworkConfig())
    load_checkpoint(folder, network)
    held_out = tokenize(Tokenizer.from_file(str(folder / "tokenizer.json")), list(corpus.texts(held_out=True)))
    figures = evaluate(network, held_out, 512, 24)
    assert figures.bits_per_byte < 1.4
    assert figures.mtp_agreement > 0.5
    assert min(figures.load_min.values()) > 0.2


def _elements(tensor: HeaderTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _load(folder: Path, weight_map: dict[str, str], name: str) -> Tensor:
    with safe_open(folder / weight_map[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
