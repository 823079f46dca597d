"""llama.cpp itself and the runner agree on the same GGUF files, logits and token ids.

These run where llama-cpp-python is installed, which compiles llama.cpp: ten minutes with two cores. A CPU is enough:

    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF" pip install -c constraints.txt -e '.[dev,llama]'

Tiny models in the forms of V2-Lite and of V3 are written as F32, then by its quantiser in the other types, and these by
the same as F32 again. So the weights that both sides compute with are llama.cpp's own, in three forms.

- Expanded, llama.cpp multiplies float32 by float32, as the runner does: the same logits, but for the order of sums.
  That holds for what the runner makes of the quantised file, and so of every block type in it.
- On the quantised file llama.cpp rounds what it multiplies by the weights, too, to F16, BF16 or blocks of eight bits.
  The runner does not. The difference is of the size of that rounding; that it is nothing else, the line above says.

Differences are relative: a position's root mean square over the standard deviation of its logits. Errors of the
matrices that a token passes are independent, so each of n adds as much to the square of the logits' error: weights with
a relative error e give logits with sqrt(n) * e, but for what softmax, SwiGLU and the router make of it (SLACK).
The median position is looked at, because where two experts are nearly equally good, rounding makes the choice another
one, and there the difference is of the size of the logits. In the family ``v3_all`` every token takes every expert, so
that there is no choice: there the worst position has a bound as well.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from tokenizers import Tokenizer

from runner.loaded import LoadedModel
from tests.gguf_files import read_model, write_model
from tests.gguf_tokenizers import BOS, TEXTS, TRAINING, add_tokenizer, edges, train

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'expert-reshard[llama]'")

from tests import llama

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
}
"""Rows of whole blocks of 256, but for keys' halves of kv_b_proj, which get a type of 32s as in published files."""

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # V2-Lite's experts have rows that are no whole block either.
    "v2_lite": ("v2_lite", "deepseek-llm", {"moe_intermediate_size": 160}),
    "v3": ("v3", "deepseek-v3", {"moe_intermediate_size": 256, "q_lora_rank": 256}),
    "v3_all": (
        "v3",
        "deepseek-v3",
        {
            "moe_intermediate_size": 256,
            "q_lora_rank": 256,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 16,
        },
    ),
}
"""Config in tests/reference, pre-tokenizer, and what is other than there."""

DEEP = ("v2_lite", "deepseek-llm", {"moe_intermediate_size": 64, "n_routed_experts": 8, "num_hidden_layers": 27})
"""V2-Lite's own number of layers, by which llama.cpp knows it."""

KINDS = [kind for kind in llama.FILE_TYPES if kind != "F32"]

ROUNDING = {"F16": 2.1e-4, "BF16": 1.7e-3} | dict.fromkeys(("Q8_0", "Q4_0", "IQ4_NL"), 5.4e-3)
"""What rounding does to normally distributed numbers, relative: to 11 bits, 8 bits, and blocks of 32 of 8 bits, whose
largest number is about 2.4 deviations and becomes 127."""

ROUNDING_K = 6.6e-3
"""The same for blocks of 256, where the largest is about 2.9 deviations: K types are multiplied by these."""

ORDER = 7.5e-7
"""Of one matrix: float32 sums of up to 512 terms in another order. Measured: 2.6e-7 of 29 matrices, 4.8e-7 where
experts are scaled by 16, and 5.3e-7 of 218."""

SLACK = 1.4
"""Over sqrt(n) times the error of one: 0.88 to 1.28 was measured for weights, 0.72 to 1.28 for what they multiply."""

LUCK = 1.3
"""The same of the worst position over the bound of the median one; 1.22 was measured."""

TOKENS = 64


@functools.cache
def trained(pre: str) -> Tokenizer:
    """A tokenizer with this pre-tokenizer."""
    return train(pre, TRAINING)


class Case:
    """A tiny model as a GGUF file of float32."""

    def __init__(self, folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray], pre: str, *, new: bool):
        self.config, self.weights, self._folder = config, weights, folder
        tokenizer = trained(pre)
        vocabulary = tokenizer.get_vocab_size()
        is_unknown = not config["q_lora_rank"] and config["num_hidden_layers"] != 27
        self.ids = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
        self.f32 = folder / "F32.gguf"
        write_model(
            self.f32,
            config,
            weights,
            lambda _name, _shape: Type.F32,
            new=new,
            tokenizer=lambda writer: add_tokenizer(
                writer, folder / "tokenizer", tokenizer, pre, rows=config["vocab_size"]
            ),
            # Without q_lora_rank it knows the published models, by their number of layers. Converters do not write 0.
            change={"attention.q_lora_rank": 0} if is_unknown else None,
        )
        self.quantised = functools.cache(self._quantised)
        self.ours = functools.cache(self._ours)

    def _quantised(self, kind: str) -> Path:
        return llama.quantise(self.f32, self._folder / f"{kind}.gguf", kind)

    def _ours(self, path: Path) -> np.ndarray:
        return LoadedModel(path, ctx=TOKENS).logits(self.ids).numpy()

    def theirs(self, path: Path) -> np.ndarray:
        return llama.logits(path, self.ids)

    def write_twin(self, folder: Path, weights: dict[str, np.ndarray]) -> Path:
        """A checkpoint of safetensors."""
        folder.mkdir()
        save_file({name: torch.tensor(value) for name, value in weights.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    @property
    def depth(self) -> int:
        """How many matrices a token passes: queries, keys and values, o_proj, an MLP's three; embedding and head."""
        queries = 2 if self.config["q_lora_rank"] else 1
        return 2 + self.config["num_hidden_layers"] * (queries + 3 + 1 + 3)

    @property
    def order(self) -> float:
        """What another order of sums may make of the logits."""
        return ORDER * math.sqrt(self.depth)


Cases = Callable[..., Case]


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory, reference: SimpleNamespace, tiny_configs: dict[str, dict[str, Any]]
) -> Iterator[Cases]:
    """Cases by family and generation of the converter; each made once, and half a gigabyte of them removed."""
    folders = []

    @functools.cache
    def case(family: str, new: bool) -> Case:
        base, pre, changes = (FAMILIES | {"v2_lite_27": DEEP}).get(family, (family, "deepseek-v3", {}))
        config = {key: value for key, value in tiny_configs[base].items() if key != "quantization_config"}
        config |= SIZES | {"vocab_size": trained(pre).get_vocab_size() + 17} | changes
        stored = reference.tiny.make_weights(config, None)
        rng = np.random.default_rng(5)
        # What is stored is BF16. These need all bits of float32, so that every type is an approximation.
        weights = {
            name: (tensor.float().numpy() * (1 + 0.01 * rng.standard_normal(tensor.shape))).astype(np.float32)
            for name, tensor in stored.items()
        }
        folders.append(tmp_path_factory.mktemp("llama"))
        return Case(folders[-1], config, weights, pre, new=new)

    # A positional argument, so that a case that is asked for in two ways is one.
    yield lambda family, *, new=True: case(family, new)
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed at once: what is in it is tens of megabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each position, relative; see the begin of this file."""
    gap = found.astype(np.float64) - expected
    return np.sqrt((gap**2).mean(axis=1)) / expected.std(axis=1)


def same_best(found: np.ndarray, expected: np.ndarray) -> float:
    """The share of positions with the same likeliest token."""
    return float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())


def exact(reference: SimpleNamespace, case: Case, **changes: Any) -> np.ndarray:
    """The logits by the oracle, in float64."""
    weights = {name: torch.from_numpy(value) for name, value in case.weights.items()}
    logits: np.ndarray = reference.deepseek.forward(case.config | changes, weights, case.ids).numpy()
    return logits


@pytest.mark.parametrize("new", [True, False], ids=["halves", "whole"])
@pytest.mark.parametrize("family", [*FAMILIES, "v2_lite_27"])
def test_float32(cases: Cases, reference: SimpleNamespace, work: Path, family: str, new: bool) -> None:
    case = cases(family, new=new)
    ours, theirs, truth = case.ours(case.f32), case.theirs(case.f32), exact(reference, case)
    assert truth.std() > 1.5
    assert difference(ours, theirs).max() < case.order
    assert difference(ours, truth).max() < case.order
    assert difference(theirs, truth).max() < case.order
    assert same_best(ours, theirs) == 1
    assert np.array_equal(ours, case.ours(case.write_twin(work / "twin", case.weights)))


@pytest.mark.parametrize("new", [True, False], ids=["halves", "whole"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_quantised_weights_stand_for(cases: Cases, work: Path, family: str, kind: str, new: bool) -> None:
    """By llama.cpp's quantiser, and expanded by it: the bits of safetensors, and llama.cpp's logits."""
    case = cases(family, new=new)
    path = case.quantised(kind)
    expanded = llama.quantise(path, work / "expanded.gguf", "F32")
    ours, values = case.ours(path), read_model(expanded)
    assert np.array_equal(ours, case.ours(expanded))
    assert np.array_equal(ours, case.ours(case.write_twin(work / "twin", values)))
    for name, value in read_model(path).items():
        assert np.array_equal(value, values[name]), name
    theirs = case.theirs(expanded)
    assert difference(ours, theirs).max() < case.order
    assert same_best(ours, theirs) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_quantised_file(cases: Cases, family: str, kind: str) -> None:
    case = cases(family)
    ours, theirs = case.ours(case.quantised(kind)), case.theirs(case.quantised(kind))
    found, one = difference(ours, theirs), ROUNDING.get(kind, ROUNDING_K)
    assert np.median(found) < SLACK * math.sqrt(case.depth) * one
    if family == "v3_all":
        assert found.max() < LUCK * SLACK * math.sqrt(case.depth) * one
    assert same_best(ours, theirs) > 0.8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_quantising_costs(cases: Cases, family: str, kind: str) -> None:
    """The file's logits and those of the weights it was made of differ as the weights do, no more and no less."""
    case = cases(family)
    held = read_model(case.quantised(kind))
    matrices = [name for name, value in case.weights.items() if value.ndim > 1]
    error = sum(float(((held[name] - case.weights[name]) ** 2).sum()) for name in matrices)
    one = math.sqrt(error / sum(float((case.weights[name] ** 2).sum()) for name in matrices))
    found = np.median(difference(case.ours(case.quantised(kind)), case.ours(case.f32)))
    assert math.sqrt(case.depth) * one / SLACK < found < SLACK * math.sqrt(case.depth) * one


@pytest.mark.parametrize("family", ["v2_lite", "v3"])
def test_token_ids(cases: Cases, family: str) -> None:
    """Of all texts, and of characters at the ends of the ranges that the pre-tokenizers name."""
    case = cases(family)
    text = LoadedModel(case.f32, ctx=TOKENS).text
    texts = [*TEXTS.values(), *(f"a{mark}{mark} {mark}1 {mark}" for mark in edges())]
    for one, theirs in zip(texts, llama.tokenize(case.f32, texts, add_special=False), strict=True):
        assert text.encode(one, add_bos=False) == theirs
    # Where there is one already llama.cpp puts a second, and the runner none.
    texts = [one for one in texts if not one.startswith(BOS)]
    for one, theirs in zip(texts, llama.tokenize(case.f32, texts, add_special=True), strict=True):
        assert text.encode(one) == theirs


# --- where llama.cpp computes something else, and the oracle says that the runner is right ---


def check_other_meaning(case: Case, truth: np.ndarray, theirs_means: np.ndarray) -> None:
    """The runner is right; llama.cpp is known to mean something else, and may be right some day."""
    ours, theirs = case.ours(case.f32), case.theirs(case.f32)
    assert difference(ours, truth).max() < case.order
    assert difference(theirs_means, truth).max() > 0.1
    assert min(difference(theirs, means).max() for means in (truth, theirs_means)) < case.order


def test_it_does_not_read_the_ends_of_the_yarn_ramp(cases: Cases, reference: SimpleNamespace) -> None:
    """Kimi-K2 has a beta_fast of 1. Converters write it, but for deepseek2 32 and 1 are what llama.cpp takes."""
    case = cases("kimi")
    scaling = case.config["rope_scaling"] | {"beta_fast": 32}
    check_other_meaning(case, exact(reference, case), exact(reference, case, rope_scaling=scaling))


def test_it_has_one_epsilon_for_all_norms(
    cases: Cases, reference: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's norms of the low ranks have 1e-6 whatever config.json says: Moonlight has 1e-5 for the others."""
    case = cases("moonlight")
    truth = exact(reference, case)
    monkeypatch.setattr(reference.deepseek, "NORM_EPS_OF_LOW_RANK", case.config["rms_norm_eps"])
    check_other_meaning(case, truth, exact(reference, case))


def test_it_ranks_groups_of_v2_by_two_experts(
    cases: Cases, reference: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As V3 does. V2, not Lite, takes the groups with the best single experts."""
    case = cases("v2")
    truth, oracle = exact(reference, case), reference.deepseek
    by_one = oracle.route_v2

    def by_two(config: dict[str, Any], logits: list[float]) -> dict[int, float]:
        # V3's choice from softmax in place of sigmoid scores, with V2's weights.
        every = by_one(config | {"topk_method": "greedy", "num_experts_per_tok": len(logits)}, logits)
        groups = {
            number: sum(sorted((every[one] for one in members), reverse=True)[:2])
            for number, members in enumerate(oracle.groups(config))
        }
        kept = [one for group in oracle.best(groups, config["topk_group"]) for one in oracle.groups(config)[group]]
        return {
            one: every[one] for one in oracle.best({one: every[one] for one in kept}, config["num_experts_per_tok"])
        }

    monkeypatch.setattr(oracle, "route_v2", by_two)
    check_other_meaning(case, truth, exact(reference, case))
