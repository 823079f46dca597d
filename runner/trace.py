"""A routing trace: which experts every pass through a model used, as a JSON document that can be replayed.

    {"format": "expert-trace", "version": 1, "model_type": "deepseek_v3", "layers": [3, 4], "experts": 256,
     "experts_per_token": 8, "passes": [{"tokens": 1, "experts": {"3": [17, ...], "4": [...]}}, ...],
     "usage": {"3": {"17": 40, ...}, "4": {...}}}

A pass has the distinct experts of every MoE layer, ascending; `usage` counts tokens, for each expert that had any.
The document is canonical (sorted keys, no blanks, ASCII), so equal traces are equal bytes. Readers refuse what they do
not know. This file must not know tensors, models or policies.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from manifests.errors import ManifestError, Problem
from manifests.jsontext import read_json
from runner.output import open_output
from runner.telemetry import ExpertIds

FORMAT = "expert-trace"
VERSION = 1

MAX_TRACE_BYTES = 64_000_000
"""25,000 tokens of DeepSeek-V3; a bound, so that a crafted file cannot take all memory."""

MAX_COUNT = 2**31 - 1
"""No layer, expert or number of tokens comes near it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass through the model.

    Attributes:
        tokens: How many went through together.
        experts: By MoE layer, the distinct experts that were used, ascending.
    """

    tokens: int
    experts: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The routing of a run.

    Attributes:
        model_type: As in config.json.
        layers: The MoE layers, ascending.
        experts: Routed experts of a layer.
        experts_per_token: How many of them a token uses.
        passes: In their order.
        usage: By layer and expert, how many tokens used it.
    """

    model_type: str
    layers: tuple[int, ...]
    experts: int
    experts_per_token: int
    passes: tuple[Pass, ...]
    usage: Mapping[int, Mapping[int, int]]

    def to_document(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model_type": self.model_type,
            "layers": list(self.layers),
            "experts": self.experts,
            "experts_per_token": self.experts_per_token,
            "passes": [
                {"tokens": one.tokens, "experts": {str(layer): list(ids) for layer, ids in one.experts.items()}}
                for one in self.passes
            ],
            "usage": {
                str(layer): {str(expert): count for expert, count in counts.items()}
                for layer, counts in self.usage.items()
            },
        }


class TraceRecorder:
    """Makes a trace. Give `observe` to a model as its observer; an interrupted pass is left out.

    Args:
        model_type: As in config.json.
        layers: The MoE layers, ascending.
        experts: Routed experts of a layer.
        experts_per_token: How many of them a token uses.
    """

    def __init__(self, *, model_type: str, layers: Sequence[int], experts: int, experts_per_token: int) -> None:
        self._model_type = model_type
        self._layers = tuple(layers)
        self._experts = experts
        self._experts_per_token = experts_per_token
        self._passes: list[Pass] = []
        self._usage: dict[int, Counter[int]] = {layer: Counter() for layer in layers}
        self._tokens = 0
        self._open: dict[int, Counter[int]] = {}

    def observe(self, layer: int, expert_ids: ExpertIds) -> None:
        """Note what one MoE layer's router chose for the tokens of one pass."""
        chosen = expert_ids.tolist()
        if layer == self._layers[0]:
            self._tokens = len(chosen)
        self._open[layer] = Counter(expert for token in chosen for expert in token)
        if layer == self._layers[-1]:
            experts = {each: tuple(sorted(counts)) for each, counts in self._open.items()}
            self._passes.append(Pass(tokens=self._tokens, experts=experts))
            for each, counts in self._open.items():
                self._usage[each].update(counts)

    def trace(self) -> Trace:
        """What was seen so far."""
        return Trace(
            model_type=self._model_type,
            layers=self._layers,
            experts=self._experts,
            experts_per_token=self._experts_per_token,
            passes=tuple(self._passes),
            usage={layer: dict(counts) for layer, counts in self._usage.items()},
        )


def save(trace: Trace, path: Path) -> None:
    """Write a trace; see `open_output`.

    Raises:
        ResourceError: The disk is full.
        ToolkitError: It cannot be written for another reason.
    """
    text = json.dumps(trace.to_document(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    with open_output(path) as file:
        file.write(text.encode("ascii") + b"\n")


def load(path: Path) -> Trace:
    """Read a trace.

    Raises:
        SourceNotFoundError: There is no such file.
        ManifestError: It is no trace of this version, or contradicts itself.
    """
    try:
        document = read_json(path, max_bytes=MAX_TRACE_BYTES)
    except ManifestError as error:
        raise ManifestError(f"{error}; make it again with `runner trace`", error.problems) from error
    return parse(document, what=str(path))


def parse(document: object, *, what: str) -> Trace:
    """Check a parsed document.

    Args:
        document: Any JSON value.
        what: Its name for the error message.

    Raises:
        ManifestError: It is no trace of this version, or contradicts itself.
    """
    return _Reader(what).trace(document)


class _Reader:
    """Typed reads; every failure names the place."""

    def __init__(self, what: str) -> None:
        self._what = what

    def trace(self, document: object) -> Trace:
        top = self._object(document, "")
        if top.get("format") != FORMAT:
            self._refuse("format", f"must be {FORMAT!r}; is it a routing trace?")
        if type(version := top.get("version")) is not int or version != VERSION:
            self._refuse("version", f"must be {VERSION}, which is all that this program knows")
        self._keys(top, "", ("format", "version", *Trace.__slots__))
        if not isinstance(top["model_type"], str):
            self._refuse("model_type", "must be a string")
        experts = self._count(top["experts"], "experts", least=1)
        per_token = self._count(top["experts_per_token"], "experts_per_token", least=1, most=experts)
        layers = self._ascending(top["layers"], "layers", most=MAX_COUNT)
        if not layers:
            self._refuse("layers", "must not be empty")
        passes = tuple(
            self._pass(value, f"passes[{number}]", layers, experts, per_token)
            for number, value in enumerate(self._list(top["passes"], "passes"))
        )
        usage = self._usage(top["usage"], layers, passes, per_token)
        return Trace(
            model_type=top["model_type"],
            layers=layers,
            experts=experts,
            experts_per_token=per_token,
            passes=passes,
            usage=usage,
        )

    def _pass(self, value: object, loc: str, layers: tuple[int, ...], experts: int, per_token: int) -> Pass:
        one = self._object(value, loc)
        self._keys(one, loc, Pass.__slots__)
        tokens = self._count(one["tokens"], f"{loc}.tokens", least=1)
        by_layer = self._object(one["experts"], f"{loc}.experts")
        self._keys(by_layer, f"{loc}.experts", [str(layer) for layer in layers])
        found = {}
        for layer in layers:
            where = f"{loc}.experts.{layer}"
            found[layer] = self._ascending(by_layer[str(layer)], where, most=experts - 1)
            if not per_token <= len(found[layer]) <= tokens * per_token:
                self._refuse(where, f"has {len(found[layer])} experts, which {tokens} tokens cannot have used")
        return Pass(tokens=tokens, experts=found)

    def _usage(
        self, value: object, layers: tuple[int, ...], passes: Sequence[Pass], per_token: int
    ) -> dict[int, dict[int, int]]:
        by_layer = self._object(value, "usage")
        self._keys(by_layer, "usage", [str(layer) for layer in layers])
        choices = per_token * sum(one.tokens for one in passes)
        usage = {}
        for layer in layers:
            where = f"usage.{layer}"
            counts = self._object(by_layer[str(layer)], where)
            appears = Counter(expert for one in passes for expert in one.experts[layer])
            self._keys(counts, where, [str(expert) for expert in sorted(appears)])
            usage[layer] = {
                expert: self._count(counts[str(expert)], f"{where}.{expert}", least=appears[expert], most=choices)
                for expert in appears
            }
            if sum(usage[layer].values()) != choices:
                self._refuse(where, f"does not sum to the {choices} choices of all tokens")
        return usage

    def _object(self, value: object, loc: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(loc, "must be an object")
        return value

    def _list(self, value: object, loc: str) -> list[Any]:
        if not isinstance(value, list):
            self._refuse(loc, "must be a list")
        return value

    def _keys(self, value: dict[str, Any], loc: str, names: Sequence[str]) -> None:
        if missing := [name for name in names if name not in value]:
            self._refuse(loc, f"lacks {missing[0]}")
        if unknown := value.keys() - set(names):
            self._refuse(loc, f"has {min(unknown)[:60]!r}, which does not belong there")

    def _count(self, value: object, loc: str, *, least: int, most: int = MAX_COUNT) -> int:
        if type(value) is not int or not least <= value <= most:
            self._refuse(loc, f"must be a whole number from {least} to {most}")
        return value

    def _ascending(self, value: object, loc: str, *, most: int) -> tuple[int, ...]:
        numbers = tuple(self._list(value, loc))
        before = -1
        for number in numbers:
            if type(number) is not int or not before < number <= most:
                self._refuse(loc, f"must hold whole numbers from 0 to {most}, ascending")
            before = number
        return numbers

    def _refuse(self, loc: str, why: str) -> NoReturn:
        where = f"{self._what}: {loc}" if loc else self._what
        raise ManifestError(f"{where} {why}", [Problem(loc=loc, kind="invalid_value", message=f"{loc or 'it'} {why}")])
