"""The store: views in the stored dtype, read on first use; what is wrong is refused by name."""

import gc
import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import manifests
from manifests.errors import IntegrityError, ManifestError, SourceNotFoundError, UnsupportedModelError
from manifests.header import HeaderTensor, encode_header
from runner import background
from runner.contents import Contents, group_of, pass_order
from runner.parameters import Parameters
from runner.weights import WeightStore


def load_files(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, by the stock library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def open_store(path: Path) -> WeightStore:
    return WeightStore(Contents(manifests.open(path)))


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


def write_odd(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The published form: no padding, so every tensor here starts at an odd offset."""
    tags = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    entries, payload = [], b""
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        begin = len(payload)
        entries.append(
            HeaderTensor(
                name=name, dtype=tags[tensor.dtype], shape=tuple(tensor.shape), begin=begin, end=begin + len(data)
            )
        )
        payload += data
    metadata = {"format": "pt"}
    while len(encode_header(entries, metadata=metadata)) % 2 == 0:
        metadata["pad"] = metadata.get("pad", "") + "x"
    path.write_bytes(encode_header(entries, metadata=metadata) + payload)


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    count = 1
    for size in shape:
        count *= size
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_comes_through_at_odd_offsets(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = random_bits(dtype, 37, 53)
    write_odd(tmp_path / "model.safetensors", {"a.weight": stored})
    location = manifests.open(tmp_path).find("a.weight")
    assert location is not None
    assert location.offset % 2 == 1
    store = open_store(tmp_path)
    found = store.tensor("a.weight")
    assert found.dtype == dtype
    assert found.shape == stored.shape
    assert torch.equal(found.clone().view(torch.uint8), stored.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_vector_may_be_read_number_by_number(tmp_path: Path, dtype: torch.dtype) -> None:
    """Norms and biases go to C as pointers to float, which must not be odd; matrices are taken as bytes there."""
    stored = random_bits(dtype, 53)
    write_odd(tmp_path / "model.safetensors", {"a.bias": stored})
    found = Parameters(open_store(tmp_path), None).vector("a.bias", 53)
    assert found.data_ptr() % found.element_size() == 0
    assert torch.equal(found.view(torch.int32), stored.to(torch.float32).view(torch.int32))


def test_what_could_not_be_read_is_read_when_it_is_whole_again(tiny_copy: Path) -> None:
    store = open_store(tiny_copy)
    away = tiny_copy / "away"
    away.mkdir()
    for shard in tiny_copy.glob("*.safetensors"):
        shard.rename(away / shard.name)
        shard.write_bytes(bytes(4000))
    for _ in range(2):
        with pytest.raises(IntegrityError, match="has 4000 bytes, expected"):
            store.tensor("model.norm.weight")
    for shard in away.iterdir():
        shard.replace(tiny_copy / shard.name)
    assert torch.equal(store.tensor("model.norm.weight"), load_files(tiny_copy)["model.norm.weight"])


def test_nothing_is_read_before_it_is_asked_for(tiny_checkpoint: Path) -> None:
    store = open_store(tiny_checkpoint)
    assert (store.usage.files, store.usage.read_bytes) == (0, 0)
    norm = store.tensor("model.norm.weight")
    assert (store.usage.files, store.usage.read_bytes) == (1, norm.nbytes)
    # The whole layer with it, but none of its experts.
    gate = store.tensor("model.layers.1.mlp.gate.weight")
    stored = load_files(tiny_checkpoint)
    layer = sum(stored[name].nbytes for name in stored if group_of(name) == "model.layers.1")
    assert layer + norm.nbytes <= store.usage.read_bytes <= layer + norm.nbytes + 64 * 1024
    assert torch.equal(gate, stored["model.layers.1.mlp.gate.weight"])


def test_the_next_groups_are_read_while_one_is_used(tiny_checkpoint: Path) -> None:
    stored = load_files(tiny_checkpoint)
    sizes = Counter[str]()
    for name, tensor in stored.items():
        sizes[group_of(name)] += tensor.nbytes
    order = pass_order(3)
    store = WeightStore(Contents(manifests.open(tiny_checkpoint)), order=order)
    for at, name in enumerate(("input_layernorm.weight", "mlp.gate.weight")):
        store.tensor(f"model.layers.{at}.{name}")
        asked = sum(sizes[group] for group in order[: at + 3])
        assert asked <= store.usage.read_bytes <= asked + 64 * 1024
    assert [tensor.nbytes for tensor in store.dense_tensors()]
    assert store.usage.resident_bytes == store.usage.read_bytes


def test_a_routed_expert_can_be_asked_for_by_name(tiny_checkpoint: Path) -> None:
    store, stored = open_store(tiny_checkpoint), load_files(tiny_checkpoint)
    prefix = "model.layers.1.mlp.experts.3."
    assert torch.equal(store.tensor(f"{prefix}up_proj.weight"), stored[f"{prefix}up_proj.weight"])
    assert store.usage.read_bytes <= sum(stored[name].nbytes for name in stored if name.startswith(prefix)) + 8192


def test_rows_are_read_alone(tiny_checkpoint: Path) -> None:
    store = open_store(tiny_checkpoint)
    whole = load_files(tiny_checkpoint)["model.embed_tokens.weight"]
    found = store.rows("model.embed_tokens.weight", [3, 299, 3]).weight
    assert torch.equal(found, whole[[3, 299, 3]])
    assert store.usage.read_bytes == found.nbytes
    assert store.shape("model.embed_tokens.weight") == tuple(whole.shape)


def test_views_share_the_memory(tiny_checkpoint: Path) -> None:
    store = open_store(tiny_checkpoint)
    once, again = store.tensor("lm_head.weight"), open_store(tiny_checkpoint).tensor("lm_head.weight")
    assert store.tensor("lm_head.weight").data_ptr() == once.data_ptr()
    assert again.data_ptr() != once.data_ptr()


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ManifestError, match=r"x\.weight is FP8 but has no weight_scale_inv"):
        open_store(tmp_path).matrix("x")


def test_unknown_names_and_dtypes_are_refused(tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(4, dtype=torch.int64)}, tmp_path / "model.safetensors")
    store = open_store(tmp_path)
    with pytest.raises(ManifestError, match="has no tensor y"):
        store.tensor("y")
    with pytest.raises(UnsupportedModelError, match="stored as I64"):
        store.tensor("x.weight")


def test_a_file_that_shrank_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x.weight": torch.zeros(4000)}, path)
    store = open_store(tmp_path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: has \d+ bytes, expected"):
        store.tensor("x.weight")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x.weight": torch.zeros(4)}, path)
    store = open_store(tmp_path)
    path.unlink()
    with pytest.raises(SourceNotFoundError, match=r"model\.safetensors: no such file"):
        store.tensor("x.weight")


def test_an_empty_tensor_needs_no_memory(tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    store = open_store(tmp_path)
    assert store.tensor("x.weight").shape == (0, 4)
    assert store.usage.files == 0


def test_no_file_stays_open(tmp_path: Path) -> None:
    """A token of DeepSeek-V3 needs 464 expert files; many systems allow 1,024 open ones."""
    shards = {f"t{number}.weight": f"model-{number:02d}-of-40.safetensors" for number in range(40)}
    for name, shard in shards.items():
        save_file({name: torch.full((8,), 3.0)}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    store = open_store(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert all(float(store.tensor(name).sum()) == 24 for name in shards)
    assert store.usage.files == 40
    assert len(os.listdir("/proc/self/fd")) == before


def regions() -> int:
    """Parts of our memory that are reserved and not taken: what `Region` makes, and nothing else here."""
    return Path("/proc/self/smaps").read_text(encoding="utf-8").count(" nr ")


def test_memory_goes_with_the_last_view(tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    gc.collect()
    before = regions()
    store = open_store(tmp_path)
    view = store.tensor("x.weight")
    del store
    gc.collect()
    assert regions() > before
    assert view.tolist() == [1, 1, 1, 1]
    del view
    gc.collect()
    assert regions() == before


def test_threads_end_with_the_store(tiny_checkpoint: Path) -> None:
    before = threading.active_count()
    store = open_store(tiny_checkpoint)
    store.tensor("model.norm.weight")
    assert threading.active_count() == before + background.THREADS
    del store
    gc.collect()
    for _ in range(1000):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before
