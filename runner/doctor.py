"""What is here and what is missing: packages, machine, and whether a checkpoint can be run.

Every check is made even if an earlier one failed, as far as it can be. Only descriptions are read, never a tensor.
This file must not print. It imports torch, and what needs torch, only after having found it installed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import manifests
from manifests import urls
from manifests.check import check_files
from manifests.config import read_object
from manifests.console import counted, format_bytes
from manifests.errors import IncompleteError, IntegrityError, ManifestError, ToolkitError
from manifests.folder import LocalFolder
from manifests.remote import Watch
from runner import demo, machine
from runner.config import ModelConfig
from runner.expected import head_of, main_tensors
from runner.forecast import Forecast, Rates, forecast
from runner.remote_folder import CachedFolder

PACKAGES = ("torch", "safetensors", "tokenizers", "jinja2", "tqdm")
"""What `generate` and `chat` cannot do without, besides what runs this command."""

_MEMORY_BYTES = 512 << 20
_LEAST_BYTES = 64 << 20
"""Of memory that is read to measure its rate: more than a cache holds, for a model that is larger than that too."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a checkpoint; None where it could not be found out.

    Attributes:
        path: Its folder.
        embedded: Whether it is the demo model of this package.
        layout: ``resharded``, or ``in_place`` for original files.
        model_type: As in config.json.
        files: Files with tensors.
        file_bytes: Their bytes.
        vocab_size: Rows of the embedding.
        tokenizer_ids: Ids that have a text.
        eos_ids: Ids that end a text.
        chat_template: Whether there is one.
        thinking: Whether the template has that switch.
        sampling: How the model samples when nothing is said.
    """

    path: str
    embedded: bool
    layout: str | None = None
    model_type: str | None = None
    files: int | None = None
    file_bytes: int | None = None
    vocab_size: int | None = None
    tokenizer_ids: int | None = None
    eos_ids: tuple[int, ...] | None = None
    chat_template: bool | None = None
    thinking: bool | None = None
    sampling: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that keeps the model from running: what it concerns, a sentence, the exit code that fits it."""

    topic: str
    message: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that was found out.

    Attributes:
        machine: Processor and memory.
        packages: Version by package; None for one that is missing.
        threads: Threads that torch computes with; None without torch.
        kernels: Instruction set of the compiled products; None where torch does them.
        model: The checkpoint.
        forecast: What it will do here; None where that cannot be known.
        problems: In the order of the checks; empty when it can run.
        notes: What works but may surprise.
    """

    machine: machine.Machine
    packages: dict[str, str | None]
    threads: int | None
    kernels: str | None
    model: ModelFacts
    forecast: Forecast | None
    problems: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 when the model can run, else that of the first problem."""
        return self.problems[0].exit_code if self.problems else 0

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        return {
            "can_run": not self.problems,
            "exit_code": self.exit_code,
            "machine": dataclasses.asdict(self.machine) | {"threads": self.threads, "kernels": self.kernels},
            "packages": self.packages,
            "model": dataclasses.asdict(self.model),
            "forecast": None if self.forecast is None else self.forecast.to_document(),
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "notes": list(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        here, model = self.machine, self.model
        threads = "" if self.threads is None else f", PyTorch computes with {self.threads} threads"
        yield f"machine    {here.system}, {here.cpu or 'unknown processor'}, {here.cores} cores{threads}"
        slowly = "PyTorch, a hundred times slower: install again where there is a C compiler"
        yield f"products   {slowly if self.kernels is None else f'compiled, {self.kernels}'}"
        yield f"features   {' '.join(here.features) or 'none that matter here'}"
        yield f"memory     {_size(here.memory_bytes)}, {_size(here.available_bytes)} available"
        yield "packages   " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in self.packages.items())
        yield f"model      {model.path}" + (" (embedded)" if model.embedded else "")
        if model.files is not None and model.file_bytes is not None:
            layout = "resharded" if model.layout == "resharded" else "original files"
            size = format_bytes(model.file_bytes)
            yield f"           {model.model_type or 'unknown type'}, {layout}, {counted(model.files, 'file')}, {size}"
        if model.tokenizer_ids is not None:
            template = "with a thinking switch" if model.thinking else "yes" if model.chat_template else "none"
            yield f"tokenizer  {model.tokenizer_ids} ids, chat template: {template}"
        if model.sampling is not None:
            greedy = model.sampling["temperature"] == 0
            values = ", ".join(f"{name} {value}" for name, value in model.sampling.items())
            yield f"sampling   {'always the most likely token' if greedy else values}"
        if self.forecast is not None:
            yield from self.forecast.lines()
        for problem in self.problems:
            yield f"PROBLEM    {problem.topic}: {problem.message}"
        for note in self.notes:
            yield f"note       {note}"
        yield f"can run    {'no' if self.problems else 'yes'}"


def examine(path: str | Path | None, watch: Watch | None = None) -> Report:
    """Check this machine and a checkpoint.

    Args:
        path: Its path or its address; None is the embedded demo model.
        watch: Is told how many of how many headers were read of original shards on a server.
    """
    found = _Findings()
    packages: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        packages[name] = _version(name)
        if packages[name] is None:
            found.add("packages", f"the package {name} is not installed; install it with pip", ToolkitError.exit_code)
    threads = compiled = None
    if packages["torch"] is not None:
        import torch

        from runner import kernels

        threads = torch.get_num_threads()
        active = kernels.active()
        compiled = None if active is None else active.variant
    here = machine.examine()
    model, expected = _examine_model(path, found, watch, can_import=None not in packages.values())
    return Report(
        machine=here,
        packages=packages,
        threads=threads,
        kernels=compiled,
        model=model,
        forecast=expected,
        problems=tuple(found.problems),
        notes=tuple(found.notes),
    )


class _Findings:
    """Collects problems and notes; turns a known error into a problem."""

    def __init__(self) -> None:
        self.problems: list[Finding] = []
        self.notes: list[str] = []

    def add(self, topic: str, message: str, exit_code: int) -> None:
        self.problems.append(Finding(topic=topic, message=message, exit_code=exit_code))

    def attempt(self, topic: str, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except ToolkitError as error:
            self.add(topic, str(error), error.exit_code)
        except OSError as error:
            # Such as a file that this user may not read.
            self.add(topic, f"{error.filename}: {error.strerror}", ToolkitError.exit_code)
        return None


def _examine_model(
    path: str | Path | None, found: _Findings, watch: Watch | None, *, can_import: bool
) -> tuple[ModelFacts, Forecast | None]:
    facts = ModelFacts(path=urls.shown_path(demo.path() if path is None else path), embedded=path is None)
    if not can_import:
        return facts, None
    # These need the packages that were just looked for.
    from runner.loaded import choose_sampling
    from runner.opening import config_of, open_checkpoint
    from runner.text import Text

    checkpoint = found.attempt("checkpoint", lambda: open_checkpoint(path, watch=watch))
    if checkpoint is None:
        return facts, None
    model_type = checkpoint.manifest.model.model_type
    facts = dataclasses.replace(
        facts,
        layout=checkpoint.manifest.layout,
        model_type=model_type,
        files=len(checkpoint.manifest.files),
        file_bytes=sum(file.size for file in checkpoint.manifest.files),
    )
    config = found.attempt("config", lambda: config_of(checkpoint))
    if isinstance(checkpoint.folder, LocalFolder):
        found.attempt("files", lambda: _check_files(checkpoint))
    else:
        found.attempt("server", lambda: _ask_server(checkpoint))
        found.notes += _remote_notes(checkpoint)
    if config is not None:
        facts = dataclasses.replace(facts, vocab_size=config.vocab_size)
        found.attempt("tensors", lambda: _check_tensors(checkpoint, config))
    text = found.attempt("tokenizer", lambda: Text.from_checkpoint(checkpoint))
    if text is not None:
        facts = dataclasses.replace(
            facts,
            tokenizer_ids=text.vocab_size,
            eos_ids=tuple(sorted(text.eos_ids)),
            chat_template=text.template is not None,
            thinking=text.template is not None and text.template.has_thinking,
        )
        if config is not None:
            found.attempt("tokenizer", lambda: _check_vocabulary(text.vocab_size, config.vocab_size))
        if text.template is None:
            found.notes.append("no chat template: `runner generate` works, `runner chat` does not")
        if not text.eos_ids:
            found.notes.append("no end-of-text token is named: generation ends only at -n, --stop or --ctx")
    generation = found.attempt("sampling", lambda: read_object(checkpoint.auxiliary, "generation_config.json"))
    if generation is not None:
        sampling = found.attempt("sampling", lambda: choose_sampling(generation, {}))
        if sampling is not None:
            facts = dataclasses.replace(facts, sampling=dataclasses.asdict(sampling))
    # Ids need no tokenizer, so what is missing there says nothing about speed.
    if config is None or any(problem.topic in ("config", "files", "tensors") for problem in found.problems):
        return facts, None
    return facts, found.attempt("memory", lambda: _foretell(checkpoint, config))


def _ask_server(checkpoint: manifests.Checkpoint) -> None:
    """Whether the server gives ranges, of the first file and the last; of the others when they are needed."""
    folder, files = checkpoint.folder, checkpoint.manifest.files
    if not isinstance(folder, CachedFolder) or folder.offline is not None:
        return
    for file in {file.path: file for file in (files[0], files[-1])}.values():
        remote = folder.remote_file(file.path)
        remote.begin(1)
        if remote.facts.size != file.size:
            raise IntegrityError(f"{remote.where}: has {remote.facts.size} bytes, the manifest says {file.size}")


def _remote_notes(checkpoint: manifests.Checkpoint) -> Iterator[str]:
    yield "its files are on a server: each is checked when it is fetched, and speed depends on the way"
    if isinstance(checkpoint.folder, CachedFolder) and checkpoint.folder.offline is not None:
        yield f"{checkpoint.folder.offline}; this is what the cache has of it"


def _foretell(checkpoint: manifests.Checkpoint, config: ModelConfig) -> Forecast:
    """Measure this machine on the checkpoint's own files, and foretell."""
    from runner import floors, kernels
    from runner.contents import Contents, pass_order
    from runner.reading import Direct, Mapped
    from runner.sizes import default_io, measure, plan_memory, routed_experts

    contents = Contents(checkpoint)
    sizes = measure(contents, config, default_io(contents, config))
    budget = plan_memory(contents, config, sizes)
    experts = routed_experts(config)
    groups = pass_order(config.num_hidden_layers, head_of(config))
    fixed = contents.used_bytes(groups)
    rates = Rates(
        memory=floors.anonymous_read_gbps(min(_MEMORY_BYTES, max(_LEAST_BYTES, fixed))),
        direct=floors.disk_read_gbps(contents, experts, way=Direct),
        mapped=floors.disk_read_gbps(contents, experts, way=Mapped) if kernels.supported() else None,
    )
    stored = contents.stored_bytes(groups)
    return forecast(config, sizes, fixed_bytes=fixed, stored_bytes=stored, budget=budget, rates=rates)


def _check_files(checkpoint: manifests.Checkpoint) -> None:
    problems = check_files(checkpoint)
    missing = [problem for problem in problems if problem.kind == "missing_file"]
    if missing:
        raise IncompleteError(
            f"{counted(len(missing), 'file')} of the manifest missing, first {missing[0].loc}; "
            "copy them back, or reshard into a new folder"
        )
    if problems:
        raise IntegrityError(
            f"{counted(len(problems), 'file')} not as the manifest says, first {problems[0].loc}: "
            f"{problems[0].message}; run `reshard verify`"
        )


def _check_tensors(checkpoint: manifests.Checkpoint, config: ModelConfig) -> None:
    needed = dict(main_tensors(config, checkpoint))
    missing = [name for name in needed if name not in checkpoint]
    if missing:
        message = f"{len(missing)} tensors that config.json asks for are not there, first {missing[0]}"
        if not checkpoint.manifest.selection.is_everything:
            raise IncompleteError(f"{message}; this is a partial checkpoint, reshard without --layers and --experts")
        raise ManifestError(f"{message}; config.json belongs to another checkpoint, or the checkpoint is not whole")
    # These need torch, which was found.
    from runner.memory import dtype_of
    from runner.parameters import check_shape

    for file in checkpoint.manifest.files:
        for tensor in file.tensors:
            if (shape := needed.get(tensor.name)) is not None:
                dtype_of(tensor.name, tensor.dtype, tensor.encoding)
                check_shape(tensor.name, tensor.logical_shape, shape)
    without_scales = checkpoint.missing_scales()
    if without_scales:
        raise ManifestError(f"{counted(len(without_scales), 'FP8 weight')} without scales, first {without_scales[0]}")


def _check_vocabulary(tokenizer_ids: int, vocab_size: int) -> None:
    # Fewer is usual: published embeddings are padded with rows that no token has.
    if tokenizer_ids > vocab_size:
        raise ManifestError(
            f"tokenizer.json has {tokenizer_ids} ids, but config.json has vocab_size {vocab_size}; "
            "they are not of one model"
        )


def _size(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
