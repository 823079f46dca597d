"""What the runner must not do: open files that no token needs, or expand more than one tensor at a time."""

import math
import shutil
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import manifests
import runner
from manifests.errors import SourceNotFoundError
from manifests.paths import Kind, Place, Widths, format_path
from manifests.schema import Selection
from reshard.plan import make_plan
from reshard.progress import Progress
from reshard.run import reshard_checkpoint
from reshard.source import read_source
from runner import demo, kernels
from runner.cache import LatentCache
from runner.loaded import LoadedModel
from runner.telemetry import Usage

PROMPT = "import os\n\n\ndef "


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, one file an expert."""
    folder = tmp_path_factory.mktemp("demo") / "experts"
    source = read_source(demo.path())
    with Progress(0, label="", quiet=True) as progress:
        reshard_checkpoint(source, make_plan(source, Selection()), folder, jobs=2, progress=progress)
    return folder


def experts_of(path: Path, max_tokens: int) -> tuple[str, set[tuple[int, int]]]:
    """The continuation of PROMPT, and every (layer, expert) that its routers chose."""
    model = runner.load(path)
    used: set[tuple[int, int]] = set()
    ids = model.text.encode(PROMPT)

    def observe(layer: int, expert_ids: torch.Tensor) -> None:
        used.update((layer, int(expert)) for expert in expert_ids.unique())

    model.model.observer = observe
    new = list(model.engine.generate(ids, max_tokens=max_tokens, sampling=model.sampling(temperature=0.0), eos_ids=()))
    return model.text.decode(new), used


def test_experts_that_a_prompt_does_not_select_are_never_opened(resharded: Path, tmp_path: Path) -> None:
    text, used = experts_of(resharded, 4)
    copy = tmp_path / "copy"
    shutil.copytree(resharded, copy)
    deleted = 0
    for layer in manifests.open(resharded).layers:
        for expert in manifests.open(resharded).experts(layer):
            if (layer, expert) not in used:
                (copy / format_path(Place(layer, Kind.EXPERT, expert), Widths(layer=1, expert=2))).unlink()
                deleted += 1
    # The MTP layer's dense part and copies are not needed either.
    shutil.rmtree(copy / "layers" / "4")
    assert deleted >= 64, "the prompt selects so much that the test says nothing"
    assert experts_of(copy, 4)[0] == text


def test_an_expert_that_is_needed_and_gone_is_named(resharded: Path, tmp_path: Path) -> None:
    _, used = experts_of(resharded, 1)
    copy = tmp_path / "copy"
    shutil.copytree(resharded, copy)
    layer, expert = min(used)
    gone = format_path(Place(layer, Kind.EXPERT, expert), Widths(layer=1, expert=2))
    (copy / gone).unlink()
    with pytest.raises(SourceNotFoundError, match=gone):
        experts_of(copy, 1)


def test_opening_a_model_reads_nothing(resharded: Path) -> None:
    model = runner.load(resharded)
    assert model.weights.usage == Usage()
    model.generate("x", max_tokens=1)
    # embed, head, four dense parts, and 8 experts for each of 2 prompt tokens in 3 layers at most.
    assert 6 + 3 * 8 <= model.weights.usage.files <= 6 + 3 * 16
    assert model.weights.usage.files == 6 + model.weights.usage.expert_misses


def test_the_same_text_from_shards_and_from_experts(resharded: Path) -> None:
    assert experts_of(demo.path(), 12) == experts_of(resharded, 12)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that torch operations have made and something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._holders: Counter[int] = Counter()
        self._ignored: set[int] = set()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these tensors' storages."""
        self._ignored.update(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._ignored or not key:
            return
        if not self._holders[key]:
            self._live += size
            self.peak = max(self.peak, self._live)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self._live -= size


def weights_of(model: LoadedModel) -> Iterator[torch.Tensor]:
    """Every stored tensor that is in memory."""
    for tensors in model.weights._dense._ready.values():
        yield from tensors.values()
    for expert in model.weights._window._held.values():
        yield from expert.tensors.values()


@pytest.mark.skipif(not kernels.supported(), reason="the kernels were not built: there was no compiler")
def test_compiled_products_expand_nothing(resharded: Path) -> None:
    model = runner.load(resharded)
    token, config = torch.tensor([5]), model.model.config
    model.model.logits(model.model.hidden(token, LatentCache(config, 256)))
    cache_bytes = config.num_hidden_layers * 256 * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    meter = LiveBytes()
    meter.ignore(weights_of(model))
    with meter:
        hidden = model.model.hidden(token, LatentCache(config, 256))
    assert meter.peak <= cache_bytes + 64 * 1024
    meter = LiveBytes()
    meter.ignore(weights_of(model))
    with meter:
        model.model.logits(hidden)
    assert config.vocab_size * 4 <= meter.peak <= config.vocab_size * 4 + 64 * 1024


@pytest.mark.usefixtures("torch_alone")
def test_never_more_than_one_tensor_is_expanded(resharded: Path) -> None:
    """Peak of torch's own memory for one token: the largest matrix as float32, the cache, activations of one token.

    Measured apart for the layers and for the head, whose matrix is six times the layers' largest: so a layer that
    kept even two of its expanded matrices would be seen.
    """
    model = runner.load(resharded)
    token = torch.tensor([5])
    # Once before: what this token needs is in memory then, and stored weights do not count here.
    model.model.logits(model.model.hidden(token, LatentCache(model.model.config, 256)))
    sizes = {tensor.name: math.prod(tensor.shape) * 4 for tensor in manifests.open(resharded).tensors()}
    largest = max(size for name, size in sizes.items() if name.startswith("model.layers.") and ".4." not in name)
    config = model.model.config
    cache = LatentCache(config, 256)
    cache_bytes = config.num_hidden_layers * 256 * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    meter = LiveBytes()
    meter.ignore(weights_of(model))
    with meter:
        hidden = model.model.hidden(token, cache)
    assert largest <= meter.peak <= largest + cache_bytes + 64 * 1024
    with meter:
        model.model.logits(hidden)
    head = sizes["lm_head.weight"]
    assert head <= meter.peak <= head + cache_bytes + 64 * 1024
