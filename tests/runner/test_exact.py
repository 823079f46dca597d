"""The same bits from every setting that must not matter: memory, ways of reading, threads, sizes of passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import manifests
from manifests.schema import Selection
from reshard.plan import make_plan
from reshard.progress import Progress
from reshard.run import reshard_checkpoint
from reshard.source import read_source
from runner import demo, kernels
from runner.config import ModelConfig
from runner.contents import Contents, pass_order
from runner.engine import Engine
from runner.model import Model
from runner.sizes import routed_experts
from runner.weights import WeightStore

pytestmark = pytest.mark.skipif(not kernels.supported(), reason="the kernels were not built: there was no compiler")

TOKENS = 70


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, one file an expert."""
    folder = tmp_path_factory.mktemp("exact") / "experts"
    source = read_source(demo.path())
    with Progress(0, label="", quiet=True) as progress:
        reshard_checkpoint(source, make_plan(source, Selection()), folder, jobs=2, progress=progress)
    return folder


@pytest.fixture(autouse=True)
def threads_again() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def logits(
    path: Path,
    *,
    slots: int | None = None,
    io: str = "mmap",
    threads: int = 2,
    pass_tokens: int = 512,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, WeightStore]:
    """Logits of every position of a text, and of a token behind it."""
    torch.set_num_threads(threads)
    checkpoint = manifests.open(path)
    config = ModelConfig.from_dict(checkpoint.config)
    store = WeightStore(
        Contents(checkpoint),
        order=pass_order(config.num_hidden_layers),
        experts=routed_experts(config),
        slots=slots,
        io=io,
    )
    engine = Engine(Model(config, store, dtype=dtype), ctx=TOKENS + 1, pass_tokens=pass_tokens)
    ids = torch.randint(config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()
    return torch.cat([engine.logits(ids), engine.last_logits([*ids, 7]).unsqueeze(0)]), store


@pytest.fixture(scope="module")
def expected() -> Tensor:
    found, _ = logits(demo.path(), io="direct")
    assert found.std() > 1
    return found


@pytest.mark.parametrize(("slots", "io"), [*itertools.product((1, 8, 9, 17, 50, None), ("mmap", "direct"))])
@pytest.mark.parametrize("source", ["shards", "experts"])
def test_memory_and_reading_change_no_bit(
    resharded: Path, expected: Tensor, source: str, slots: int | None, io: str
) -> None:
    found, store = logits(resharded if source == "experts" else demo.path(), slots=slots, io=io)
    assert torch.equal(found, expected)
    usage = store.usage
    # With few slots nearly everything is read again; with all of them nothing is.
    assert usage.expert_hits + usage.expert_misses > 192
    if slots is None:
        assert usage.expert_misses <= 192
    elif slots < 50:
        assert usage.expert_misses > 192


@pytest.mark.parametrize(("pass_tokens", "threads"), [(1, 2), (7, 1), (64, 3), (512, 1), (512, 3)])
def test_threads_and_passes_change_no_bit(expected: Tensor, pass_tokens: int, threads: int) -> None:
    assert torch.equal(logits(demo.path(), threads=threads, pass_tokens=pass_tokens)[0], expected)


def test_nor_do_they_where_activations_are_rounded(resharded: Path, expected: Tensor) -> None:
    """The size of a pass may change a rounding there; memory, reading and threads must not."""
    rounded, _ = logits(demo.path(), io="direct", dtype=torch.bfloat16)
    assert not torch.equal(rounded, expected)
    for slots, io, threads in [(1, "mmap", 2), (9, "direct", 1), (17, "mmap", 3), (50, "direct", 2), (None, "mmap", 1)]:
        for path in (resharded, demo.path()):
            found, _ = logits(path, slots=slots, io=io, threads=threads, dtype=torch.bfloat16)
            assert torch.equal(found, rounded), (slots, io, threads)


def test_two_rounded_rows_are_two_single_ones() -> None:
    """What speculation with bfloat16 rests on: a guess is checked in a pass of two."""
    single, _ = logits(demo.path(), pass_tokens=1, dtype=torch.bfloat16)
    double, _ = logits(demo.path(), pass_tokens=2, dtype=torch.bfloat16)
    assert torch.equal(single, double)


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("slots", [3, None])
def test_blocks_within_a_pass_change_no_bit(
    expected: Tensor, block: int, slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.layer.BLOCK_TOKENS", block)
    monkeypatch.setattr("runner.moe.BLOCK_TOKENS", block)
    assert torch.equal(logits(demo.path(), slots=slots)[0], expected)


def test_two_models_in_two_threads_do_not_meet(expected: Tensor) -> None:
    with ThreadPoolExecutor(2) as threads:
        for found, _ in threads.map(lambda io: logits(demo.path(), io=io), ["mmap", "direct"] * 3):
            assert torch.equal(found, expected)


@pytest.mark.usefixtures("torch_alone")
def test_memory_changes_no_bit_of_torchs_products() -> None:
    whole, _ = logits(demo.path(), io="direct")
    assert torch.equal(logits(demo.path(), io="direct", slots=5)[0], whole)


@pytest.mark.parametrize("variant", kernels.supported())
def test_every_instruction_set_is_near(expected: Tensor, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instruction sets round alike but for the portable one, which has no fused multiply-add."""
    library = kernels.library()
    assert library is not None
    one = kernels.Kernels(library, variant)
    monkeypatch.setattr(kernels, "active", lambda: one)
    found, _ = logits(demo.path())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    if variant != "portable":
        assert torch.equal(found, expected)
