"""Models of GGUF files run in place: the same bits as from safetensors files that hold the expanded values."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from torch import Tensor

import manifests
from manifests.errors import (
    IntegrityError,
    ManifestError,
    ResourceError,
    SourceNotFoundError,
    ToolkitError,
    UnsupportedModelError,
)
from manifests.names import expert_prefix
from manifests.schema import Selection
from reshard.plan import make_plan
from reshard.progress import Progress
from reshard.run import reshard_checkpoint
from reshard.source import read_source
from runner import kernels, split_kv
from runner.config import ModelConfig
from runner.contents import Contents, pass_order
from runner.engine import Engine
from runner.fp8 import Matrix
from runner.layout import HUGE_PAGE_BYTES
from runner.loaded import LoadedModel, open_checkpoint
from runner.memory import Region
from runner.model import Model
from runner.parameters import Parameters
from runner.sizes import measure, routed_experts
from runner.weights import WeightStore
from tests.gguf_files import Kinds, write_gguf, write_model

IDS = torch.randint(288, (19,), generator=torch.Generator().manual_seed(3)).tolist()

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
}
"""Whole blocks in every row: of 32, and of 256 where rows are as long as the residual stream."""


def one(kind: Type) -> Kinds:
    return lambda name, shape: kind


def mixed(name: str, shape: tuple[int, ...]) -> Type:
    return Type.Q5_0 if "down" in name or "attn_k" in name or name == "output.weight" else Type.Q4_0


def k_types(name: str, shape: tuple[int, ...]) -> Type:
    """As Q4_K_M has it: some matrices in more bits, others in 32s where a row is no whole block of 256."""
    if shape[-1] % 256:
        return Type.Q8_0 if "down" in name else Type.Q5_0
    return Type.Q6_K if name == "output.weight" or "down" in name or "attn_q" in name else Type.Q4_K


def rare(name: str, shape: tuple[int, ...]) -> Type:
    """One type that no kernel multiplies by, in a model of others."""
    return Type.TQ2_0 if name.endswith("attn_output.weight") else mixed(name, shape)


KINDS: dict[str, Kinds] = {
    "F32": one(Type.F32),
    "F16": one(Type.F16),
    "BF16": one(Type.BF16),
    "Q8_0": one(Type.Q8_0),
    "mixed": mixed,
    "K": k_types,
    "rare": rare,
}


class Case:
    """A GGUF file, and a folder of safetensors with what it holds."""

    def __init__(
        self, folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray], kinds: Kinds, **options: Any
    ):
        self.config = config
        self.gguf = folder / "model.gguf"
        self.held = write_model(self.gguf, config, weights, kinds, **options)
        self.twin = folder / "twin"
        self.twin.mkdir()
        write_twin(self.twin, config, self.held)

    @functools.cached_property
    def expected(self) -> Tensor:
        found = logits(self.twin)
        assert found.std() > 1
        return found


def write_twin(folder: Path, config: dict[str, Any], held: dict[str, np.ndarray]) -> None:
    save_file({name: torch.from_numpy(value).clone() for name, value in held.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def logits(path: Path, **options: Any) -> Tensor:
    return LoadedModel(path, ctx=64, **options).logits(IDS)


Cases = Callable[..., Case]


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory,
    reference: SimpleNamespace,
    tiny_configs: dict[str, dict[str, Any]],
) -> Cases:
    """Cases by family, types and generation; each made once."""

    def config_of(family: str, **changes: Any) -> dict[str, Any]:
        config = {key: value for key, value in tiny_configs[family].items() if key != "quantization_config"}
        q_rank = {"q_lora_rank": 96} if config["q_lora_rank"] else {}
        return config | SIZES | q_rank | changes

    @functools.cache
    def case(
        family: str,
        kinds: str = "mixed",
        *,
        new: bool = True,
        tied: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **options: Any,
    ) -> Case:
        ends = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        config = config_of(family, tie_word_embeddings=tied, **ends)
        stored = reference.tiny.make_weights(config, None)
        weights = {name: tensor.float().numpy() for name, tensor in stored.items()}
        leave_out = ("output.weight",) if tied else ()
        folder = tmp_path_factory.mktemp("gguf-model")
        return Case(folder, config, weights, KINDS[kinds], new=new, leave_out=leave_out, **options)

    return case


@pytest.mark.parametrize("new", [True, False], ids=["halves", "whole"])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("family", ["v2_lite", "v3"])
def test_the_file_and_its_expanded_twin_have_the_same_bits(cases: Cases, family: str, kinds: str, new: bool) -> None:
    case = cases(family, kinds, new=new)
    assert ModelConfig.from_dict(manifests.open(case.gguf).config) == ModelConfig.from_dict(case.config)
    assert torch.equal(logits(case.gguf), case.expected)


@pytest.mark.parametrize("family", ["v2", "moonlight"])
def test_other_routers_come_through_the_metadata(cases: Cases, family: str) -> None:
    """Groups by their best expert and no bias; a bias, one group and no YaRN."""
    case = cases(family)
    assert torch.equal(logits(case.gguf), case.expected)


@pytest.mark.parametrize("new", [True, False], ids=["halves", "whole"])
def test_the_mathematics_is_that_of_the_oracle(cases: Cases, reference: SimpleNamespace, new: bool) -> None:
    case = cases("v3", "Q8_0", new=new)
    weights = {name: torch.from_numpy(value) for name, value in case.held.items()}
    expected = reference.deepseek.forward(case.config, weights, IDS)
    torch.testing.assert_close(logits(case.gguf).double(), expected, rtol=0, atol=2e-4)


def in_window(path: Path, slots: int | None, io: str, pass_tokens: int) -> tuple[Tensor, WeightStore]:
    """Logits with so many experts in memory, and so many tokens of a pass."""
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_dict(checkpoint.config)
    store = WeightStore(
        Contents(checkpoint),
        order=pass_order(config.num_hidden_layers),
        experts=routed_experts(config),
        slots=slots,
        io=io,
    )
    engine = Engine(Model(config, store), ctx=64, pass_tokens=pass_tokens)
    return engine.logits(IDS), store


@pytest.mark.skipif(not kernels.supported(), reason="mapping, and rows that do not depend on others, need the kernels")
@pytest.mark.parametrize("pass_tokens", [1, 5, 64])
@pytest.mark.parametrize("io", ["mmap", "direct"])
@pytest.mark.parametrize("slots", [1, 7, None])
@pytest.mark.parametrize("kinds", ["mixed", "K"])
def test_memory_reading_and_passes_change_no_bit(
    cases: Cases, kinds: str, slots: int | None, io: str, pass_tokens: int
) -> None:
    case = cases("v3", kinds)
    found, store = in_window(case.gguf, slots, io, pass_tokens)
    assert torch.equal(found, case.expected)
    if slots is None:
        assert store.usage.expert_misses <= 32
    elif pass_tokens == 1:
        assert store.usage.expert_misses > 32  # some were read again


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("kinds", ["F16", "mixed"])
def test_without_kernels_too(cases: Cases, kinds: str) -> None:
    case = cases("v2_lite", kinds)
    assert torch.equal(logits(case.gguf, io="direct"), logits(case.twin, io="direct"))


def test_experts_are_read_alone(cases: Cases) -> None:
    """What nobody chose stays on the disk, though it lies in one tensor with what was chosen."""
    case = cases("v3", "Q8_0")
    loaded = LoadedModel(case.gguf, ctx=64, io="direct")
    loaded.logits(IDS[:1])
    experts, size = 2 * case.config["num_experts_per_tok"], loaded.budget.expert
    assert size == 3 * 64 * 256 // 32 * 34
    assert loaded.weights.usage.expert_misses == experts
    files = case.gguf.stat().st_size
    stacks = 2 * case.config["n_routed_experts"] * size
    embedding = case.config["vocab_size"] * 256 // 32 * 34
    # Of the embedding one row, of the rest all.
    assert loaded.weights.read_bytes < files - stacks - embedding + experts * size + 65536


def test_only_the_rows_that_are_asked_for_are_read_and_expanded(cases: Cases) -> None:
    case = cases("v3", "K")
    store = WeightStore(Contents(open_checkpoint(case.gguf)))
    rows = store.rows("model.embed_tokens.weight", [5, 287, 5])
    assert (rows.encoding, tuple(rows.weight.shape), rows.shape) == ("Q4_K", (3, 144), (3, 256))
    assert store.usage.read_bytes == 3 * 144
    assert store.shape("model.embed_tokens.weight") == (288, 256)


def test_the_embedding_serves_as_head_where_there_is_none(cases: Cases) -> None:
    case = cases("v2_lite", tied=True)
    assert "lm_head.weight" not in case.held
    found = logits(case.gguf)
    assert torch.equal(found, case.expected)
    # The twin is tied as well; this one has the same matrix twice.
    apart = case.twin.with_name("apart")
    apart.mkdir()
    head = {"lm_head.weight": case.held["model.embed_tokens.weight"]}
    write_twin(apart, case.config | {"tie_word_embeddings": False}, case.held | head)
    assert torch.equal(logits(apart), found)
    plan, other = (LoadedModel(path, ctx=64).budget.dense for path in (case.twin, apart))
    assert plan == other


def test_a_folder_with_one_model_whole_or_split(cases: Cases, tmp_path: Path) -> None:
    case = cases("v3", "mixed")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "any.gguf").symlink_to(case.gguf)
    with pytest.raises(ManifestError, match="leaves the folder"):
        LoadedModel(tmp_path / "one")
    assert torch.equal(logits(case.gguf.parent), case.expected)
    split = cases("v3", "mixed", split_max_tensors=11)
    (first, *others) = sorted(split.gguf.parent.glob("*.gguf"))
    assert others
    for path in (first.parent, first, *others):
        assert torch.equal(logits(path), case.expected)


def test_a_file_of_a_set_that_is_not_whole(cases: Cases, tmp_path: Path, call: Callable[..., Result]) -> None:
    for path in cases("v3", "mixed", split_max_tensors=11).gguf.parent.glob("*.gguf"):
        shutil.copy(path, tmp_path)
    first, *others = sorted(tmp_path.iterdir())
    renamed = tmp_path / "other.gguf"
    shutil.copy(others[0], renamed)
    others[-1].unlink()
    for path in (first, others[0]):
        result = call("logits", "-m", path, "--ids", "1")
        assert (result.exit_code, result.stdout) == (10, "")
        missing = f"files of a split model are missing, first {others[-1].name}; download them, or give them back their"
        assert missing in result.stderr
    result = call("logits", "-m", others[-1], "--ids", "1")
    assert (result.exit_code, result.stderr) == (10, f"runner: {others[-1]}: no such file or folder\n")
    result = call("logits", "-m", renamed, "--ids", "1")
    assert result.exit_code == 12
    assert f"{renamed}: is one file of a split model, and its name does not say which the others are" in result.stderr


def test_what_is_made_of_the_halves_is_counted(cases: Cases) -> None:
    halves, whole = cases("v3", "F16", new=True), cases("v3", "F16", new=False)
    made = 3 * 4 * (32 + 64) * 64 * 4
    sizes = []
    for case in (halves, whole):
        checkpoint = open_checkpoint(case.gguf)
        config = ModelConfig.from_dict(checkpoint.config)
        sizes.append(measure(Contents(checkpoint), config, "direct").dense)
    # And two pairs of halves: those that are being joined, and the next.
    assert sizes[0] - sizes[1] == made + 2 * HUGE_PAGE_BYTES
    _, store = in_window(halves.gguf, None, "direct", 64)
    _, other = in_window(whole.gguf, None, "direct", 64)
    dense = [sum(tensor.nbytes for tensor in one.dense_tensors()) for one in (store, other)]
    # Whoever reads all dense weights for a token reads the joined ones, in float32, and not the halves.
    assert dense[0] - dense[1] == made // 2
    held = [one.usage.resident_bytes - one.usage.read_bytes for one in (store, other)]
    assert held[0] - held[1] == made - made // 2  # what was read of the halves is not there any more
    groups = pass_order(3)
    contents = [Contents(open_checkpoint(case.gguf)) for case in (halves, whole)]
    assert [one.used_bytes(groups) for one in contents] == dense
    assert contents[0].stored_bytes(groups) == contents[1].stored_bytes(groups)


@pytest.mark.parametrize("kinds", ["F32", "K"])
def test_halves_are_let_go_once_they_are_joined(cases: Cases, monkeypatch: pytest.MonkeyPatch, kinds: str) -> None:
    """On the memory itself: at every join, and at the end, no more is there than the budget says."""
    case = cases("v3", kinds, new=True)
    regions: list[tuple[weakref.ref[object], int]] = []
    moments: list[int] = []

    class Watched(Region):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            regions.append((weakref.ref(self._bytes), self.size))

    def live() -> int:
        return sum(size for region, size in regions if region() is not None)

    def watched_join(k_b: Matrix, v_b: Matrix) -> Tensor:
        made = join(k_b, v_b)
        moments.append(live() + (len(moments) + 1) * made.nbytes)
        return made

    join = split_kv.join
    monkeypatch.setattr(split_kv, "join", watched_join)
    monkeypatch.setattr("runner.dense.Region", Watched)
    loaded = LoadedModel(case.gguf, ctx=64, io="direct", ram=4 << 30)
    for _ in range(2):
        assert torch.equal(loaded.logits(IDS), case.expected)
        assert len(moments) == 3
        kept = [loaded.contents.group(group).size for group in pass_order(3)]
        assert live() == sum(-(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES for size in kept)
        assert live() + 3 * 4 * (32 + 64) * 64 * 4 <= loaded.budget.dense - 2 * HUGE_PAGE_BYTES
        assert max(moments) <= loaded.budget.dense
        assert len(regions) == 8  # three layers and their halves, norm and head


def test_halves_are_read_ahead_once_and_again_by_name(cases: Cases) -> None:
    case = cases("v3", "F32", new=True)
    contents = Contents(open_checkpoint(case.gguf))
    sizes = {group: contents.group(group).needed_bytes for group in contents.with_halves(pass_order(3))}
    halves = "model.layers.{}.self_attn.kv_b_proj"
    store = WeightStore(contents, order=pass_order(3))
    store.tensor("model.layers.0.input_layernorm.weight")
    expected = sizes["model.layers.0"] + sizes[halves.format(0)] + sizes["model.layers.1"]
    assert store.usage.read_bytes == expected
    whole = store.matrix(halves.format(1)).weight.view(4, 96, 64)
    expected += sizes[halves.format(1)] + sizes["model.layers.2"] + sizes[halves.format(2)]
    assert store.usage.read_bytes == expected
    # They are behind these, but were used already.
    store.matrix(halves.format(0))
    assert store.usage.read_bytes == expected
    assert torch.equal(store.tensor("model.layers.1.self_attn.k_b_proj.weight"), whole[:, :32].mT)
    assert torch.equal(store.tensor("model.layers.1.self_attn.v_b_proj.weight"), whole[:, 32:])
    assert store.usage.read_bytes == expected + sizes[halves.format(1)]


def test_halves_of_the_wrong_sizes_are_refused_though_their_sum_is_right(cases: Cases) -> None:
    case = cases("v3", "F32", new=True)
    parameters = Parameters(WeightStore(Contents(open_checkpoint(case.gguf))), None)
    prefix, heads = "model.layers.0.self_attn", case.config["num_attention_heads"]
    with pytest.raises(IntegrityError, match=r"k_b_proj\.weight has shape \[4, 64, 32\], but .* \[4, 64, 64\]"):
        parameters.kv_b(prefix, heads, (64, 32), 64)
    assert parameters.kv_b(prefix, heads, (32, 64), 64).shape == (384, 64)


def test_one_half_alone_does_not_stand_for_the_whole() -> None:
    assert split_kv.halves("a.kv_b_proj.weight", {"a.k_b_proj.weight"}) is None
    assert split_kv.halves("a.kv_b_proj.weight", {"a.k_b_proj.weight", "a.v_b_proj.weight"}) is not None
    assert split_kv.halves("a.o_proj.weight", {"a.k_b_proj.weight", "a.v_b_proj.weight"}) is None


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "Q1_0"])
def test_blocks_that_cannot_be_expanded_are_refused_at_opening(
    tmp_path: Path, call: Callable[..., Result], kind: str
) -> None:
    elements, size = {"Q8_1": (32, 40), "Q8_K": (256, 292), "Q1_0": (128, 18)}[kind]
    number = {"Q8_1": 9, "Q8_K": 15, "Q1_0": 41}[kind]
    path = write_header(tmp_path / "x.gguf", number, 256, 256 // elements * size)
    with pytest.raises(
        UnsupportedModelError, match=f"model.embed_tokens.weight is encoded as {kind}; the runner reads"
    ):
        LoadedModel(path)
    result = call("logits", "-m", path, "--ids", "1")
    assert result.exit_code == 14
    assert f"model.embed_tokens.weight is encoded as {kind}" in result.stderr


def write_header(path: Path, number: int, columns: int, size: int) -> Path:
    """A file with an embedding of one row of this type alone: nothing else is looked at before it."""

    def text(value: str) -> bytes:
        return len(value).to_bytes(8, "little") + value.encode()

    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + (1).to_bytes(8, "little")
    head += text("general.architecture") + (8).to_bytes(4, "little") + text("deepseek2")
    head += text("token_embd.weight") + (1).to_bytes(4, "little") + columns.to_bytes(8, "little")
    head += number.to_bytes(4, "little") + (0).to_bytes(8, "little")
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(size) + bytes(-size % 32))
    return path


def test_another_architecture_is_named(cases: Cases, tmp_path: Path) -> None:
    content = cases("v3").gguf.read_bytes().replace(b"deepseek2", b"deepseek9")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match="is of architecture 'deepseek9'; the runner knows deepseek2"):
        LoadedModel(tmp_path / "x.gguf")


@pytest.mark.parametrize("way", ["rare types", "nothing compiled"])
def test_the_package_is_asked_for_at_opening(
    cases: Cases, monkeypatch: pytest.MonkeyPatch, way: str, request: pytest.FixtureRequest
) -> None:
    plain, case = cases("v3", "F16"), cases("v3", "rare" if way == "rare types" else "mixed")
    if way == "nothing compiled":
        request.getfixturevalue("torch_alone")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ToolkitError,
        match=r"(TQ2_0|Q4_0).*needs the package gguf; install it with: pip install 'expert-reshard\[gguf\]'",
    ):
        LoadedModel(case.gguf)
    assert LoadedModel(plain.gguf).root


@pytest.mark.skipif(not kernels.supported(), reason="expanding without the package needs the kernels")
@pytest.mark.parametrize("kinds", ["mixed", "K", "Q8_0"])
@pytest.mark.parametrize("new", [True, False], ids=["halves", "whole"])
def test_the_common_types_need_no_package(cases: Cases, monkeypatch: pytest.MonkeyPatch, kinds: str, new: bool) -> None:
    case = cases("v3", kinds, new=new)
    expected = case.expected
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError):
        importlib.import_module("gguf")
    assert torch.equal(logits(case.gguf), expected)


def test_a_manifest_that_lies_about_blocks_is_refused(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = manifests.open(cases("v3", "mixed").gguf)
    entry = next(one for one in checkpoint.manifest.files[0].tensors if one.encoding == "Q4_0")
    object.__setattr__(entry, "logical_shape", (*entry.logical_shape[:-1], entry.logical_shape[-1] + 32))
    monkeypatch.setattr("runner.opening.open_model", lambda path: checkpoint)
    with pytest.raises(IntegrityError, match=r"in Q4_0 and stored as U8 .* 18 bytes, so the checkpoint is damaged"):
        open_checkpoint(checkpoint.root)


@pytest.mark.parametrize("kinds", ["mixed", "K"])
@pytest.mark.parametrize("new", [True, False], ids=["halves", "whole"])
def test_resharded_it_has_the_same_bits(cases: Cases, tmp_path: Path, kinds: str, new: bool) -> None:
    case, folder = cases("v3", kinds, new=new), tmp_path / "experts"
    source = read_source(case.gguf)
    with Progress(0, label="", quiet=True) as progress:
        reshard_checkpoint(source, make_plan(source, Selection()), folder, jobs=2, progress=progress)
    assert {one.encoding for one in manifests.open(folder).tensors()} > {"plain", "Q5_0"}
    for io in ("mmap", "direct"):
        assert torch.equal(logits(folder, io=io), case.expected)
    blocks = sum(tensor.size for tensor in manifests.open(folder).tensors() if ".experts.3." in tensor.name)
    assert LoadedModel(folder, ctx=64).budget.expert == blocks // 2


@pytest.mark.parametrize("io", ["mmap", "direct"])
def test_as_little_memory_as_it_needs(cases: Cases, io: str) -> None:
    case = cases("v3", "K")
    budget = LoadedModel(case.gguf, ctx=64, io=io).budget
    with pytest.raises(ResourceError, match="needs at least"):
        LoadedModel(case.gguf, ctx=64, io=io, ram=budget.fixed // 2)
    loaded = LoadedModel(case.gguf, ctx=64, io=io, ram=budget.fixed + 4 * budget.slot + (32 << 20))
    assert torch.equal(loaded.logits(IDS), case.expected)
    assert io == "direct" or loaded.budget.slots < 16


def test_single_shards_are_still_refused(cases: Cases) -> None:
    with pytest.raises(SourceNotFoundError, match="is one file; give the folder"):
        LoadedModel(cases("v3").twin / "model.safetensors")


def test_the_bytes_of_an_expert_are_handed_out_as_they_are(cases: Cases) -> None:
    case = cases("v3", "Q8_0")
    view = manifests.open(case.gguf).expert(1, 3)["down_proj.weight"]
    blocks = np.frombuffer(view.data, np.uint8).reshape(-1, 34)
    scales, numbers = blocks[:, :2].copy().view(np.float16).astype(np.float32), blocks[:, 2:].view(np.int8)
    expected = case.held[f"{expert_prefix(1, 3)}down_proj.weight"]
    assert np.array_equal((scales * numbers).reshape(expected.shape), expected)


def test_commands_take_the_file(cases: Cases, call: Callable[..., Result], tmp_path: Path) -> None:
    case = cases("v3", "mixed")
    ids = ",".join(map(str, IDS))
    result = call("logits", "-m", case.gguf, "--ids", ids, "--out", tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.output
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], case.expected)
    result = call("bench", "-m", case.gguf, "--prompt-tokens", "9", "-n", "5")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["fixed_bytes"] > 0
    # Nor does a tokenizer of another kind keep ids from being computed with.
    other = cases("v3", "mixed", bos_token_id=0, eos_token_id=1).gguf
    content = other.read_bytes()
    (tmp_path / "other.gguf").write_bytes(content.replace(b"gpt2", b"bert", 1))
    result = call("logits", "-m", tmp_path / "other.gguf", "--ids", ids)
    assert result.exit_code == 0, result.output
    # It has no tokenizer; nothing else is wrong with it, whichever form kv_b_proj has.
    for path in (case.gguf, cases("v3", "mixed", new=False).gguf):
        found = json.loads(call("doctor", "-m", path, "--json").stdout)
        assert {problem["topic"] for problem in found["problems"]} == {"tokenizer"}
        assert found["forecast"]["budget"]["dense_bytes"] > 0


def test_what_the_metadata_lacks_is_said_of_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", change={"rope.freq_base": None})
    with pytest.raises(ManifestError, match=r"^.*x\.gguf: as its metadata has it, config\.json lacks rope_theta"):
        LoadedModel(tmp_path / "x.gguf")
