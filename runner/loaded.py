"""A checkpoint that is ready to write text: weights, engine and tokenizer joined.

This is where the engine's token ids and the tokenizer's text meet; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from manifests.config import read_object
from manifests.errors import ManifestError, ResourceError, ToolkitError, UnsupportedModelError
from manifests.remote import Watch
from runner import kernels, trace
from runner.budget import Budget
from runner.config import ModelConfig
from runner.contents import Contents, pass_order
from runner.drafter import Drafter, Takes
from runner.engine import Engine
from runner.expected import head_of
from runner.model import Model
from runner.mtp import MtpModule
from runner.mtp_parts import MtpParts
from runner.opening import config_of, open_checkpoint
from runner.pace import Pace
from runner.policy import Key
from runner.remote_folder import CachedFolder
from runner.sampling import SamplingParams
from runner.sizes import check_cache, default_io, measure, plan_memory, routed_experts
from runner.speculative import Speculation
from runner.telemetry import RunStats, Telemetry
from runner.text import StopScanner, Text
from runner.weights import WeightStore

Speculate = Literal["auto", "on", "off"]

MAX_TOKENS = 128
"""New tokens when nobody says how many."""


class Generation:
    """One continuation, while it is made and afterwards. Iterate over it for pieces of text as they become certain.

    Attributes:
        ids: The new ids so far.
        finish_reason: ``eos``, ``length`` (as many as were asked for), ``context`` (no room for more), ``stop``
            (a stop string came), or ``interrupted`` as long as none of these has happened.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        stops: Sequence[str] = (),
    ) -> None:
        self.ids: list[int] = []
        self.finish_reason = "interrupted"
        self._loaded = loaded
        self._telemetry = Telemetry(len(ids))
        self._before = loaded.weights.usage
        self._decoder = loaded.text.stream()
        self._scanner = StopScanner(stops)
        # The last token of a full context is written but not read, so it needs no position of its own.
        room = max(0, loaded.ctx - len(ids) + 1)
        self._max_tokens = min(max_tokens, room)
        self._end_reason = "length" if max_tokens <= room else "context"
        self._tokens = loaded.engine.generate(
            ids, max_tokens=self._max_tokens, sampling=sampling, eos_ids=loaded.text.eos_ids
        )

    def __iter__(self) -> Iterator[str]:
        self._loaded.model.observer = self._telemetry.observe
        while not self._scanner.stopped:
            if len(self.ids) >= self._max_tokens:
                self.finish_reason = self._end_reason
                break
            with self._telemetry.step():
                token = next(self._tokens, None)
            if token is None:
                self.finish_reason = "eos"
                break
            self.ids.append(token)
            self._telemetry.count_token()
            if piece := self._scanner.push(self._decoder.push(token)):
                yield piece
        else:
            self.finish_reason = "stop"
        if rest := self._scanner.push(self._decoder.flush()) + self._scanner.flush():
            yield rest

    @property
    def stats(self) -> RunStats:
        """What the run has cost so far."""
        return self._telemetry.stats(self._loaded.weights.usage.since(self._before))


class LoadedModel:
    """A model over a checkpoint. Opening it reads descriptions only; weights are mapped when they are used.

    Args:
        path: A resharded checkpoint, a plain checkpoint folder, or a GGUF model (its file, any file of its split set,
            or a folder with one); or the address of one of these; None for the embedded demo model.
        ctx: The most positions that a text may have; when not given, what fits, up to the model's own limit.
        dtype: What activations are rounded to before each product, float32 or bfloat16.
        ram: Bytes that the process may take in all; what the machine has to give when not given.
        io: How experts come into memory, ``mmap`` or ``direct``; see `sizes.default_io`.
        pin: A routing trace; the experts that it used most are read now and stay in memory.
        speculate: Whether the MTP layer guesses tokens, several of which are then checked in one pass: ``on``,
            ``off``, or ``auto``, while it pays. The text is the same.
        draft_tokens: Most guesses of one pass; with bfloat16 one, because three rows of a pass may be rounded otherwise
            than one is.
        mtp_input: Which hidden states the MTP layer is given.
        cache_size: Bytes of disk that may keep what is fetched of checkpoints on servers; any number when not given.
        watch: Is told how many of how many headers were read of original shards on a server.

    Attributes:
        name: The checkpoint's folder or address.
        ctx: As given, or what the memory and the model allow.
        budget: What the memory is for.
        contents: What the checkpoint has.
        io: As given.
        draft_tokens: As given, or what bfloat16 allows.
        mtp: What it has of the MTP layer.
        mtp_module: That layer; None when speculation is off.
        speculation: Guesses tokens; None when that is off.
        idle_speculation: Why it is off though it was not asked to be; None when nothing keeps it off.

    Raises:
        SourceNotFoundError: There is no checkpoint, or it has no config.json, or is a part of one.
        ManifestError, IntegrityError: The checkpoint is damaged.
        UnsupportedModelError: Its config asks for something that is not implemented.
        ResourceError: The context is larger than the model's, or the memory is too small for the model.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        ctx: int | None = None,
        dtype: torch.dtype = torch.float32,
        ram: int | None = None,
        io: str | None = None,
        pin: str | Path | None = None,
        speculate: Speculate = "auto",
        draft_tokens: int = 1,
        mtp_input: Takes = "normed",
        cache_size: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        checkpoint = open_checkpoint(path, cache_size, watch)
        if missing := checkpoint.missing_scales():
            # Said now, and not after minutes, when a token first needs one of them.
            raise ManifestError(
                f"{checkpoint.folder}: FP8 weight {missing[0]} ({len(missing)} in all) has no weight_scale_inv; "
                "without its scales it has no value, download the checkpoint again"
            )
        config = config_of(checkpoint)
        self._checkpoint = checkpoint
        self.name = str(checkpoint.folder)
        self.contents = contents = Contents(checkpoint)
        self.io = io or default_io(contents, config)
        self.mtp = MtpParts(checkpoint, config)
        self.budget, has_mtp = self._plan(config, ram=ram, ctx=ctx, speculate=speculate)
        check_cache(contents, config, self.mtp if has_mtp else None)
        self.ctx = self.budget.ctx
        self.weights = WeightStore(
            contents,
            order=pass_order(config.num_hidden_layers, head_of(config)),
            experts=routed_experts(config, has_mtp=has_mtp),
            slots=self.budget.slots,
            io=self.io,
        )
        if pin is not None:
            self.weights.pin(self._most_used(trace.load(Path(pin)), config))
        self.model = Model(config, self.weights, dtype=dtype)
        self.mtp_module = self.speculation = None
        self.draft_tokens = draft_tokens = draft_tokens if dtype == torch.float32 else 1
        if has_mtp:
            embedding, head = (copy.used.removesuffix(".weight") for copy in self.mtp.copies)
            self.mtp_module = MtpModule(config, self.weights, embedding=embedding, head=head, dtype=dtype)
            self.speculation = Speculation(
                Drafter(self.mtp_module, self.ctx, takes=mtp_input),
                draft_tokens,
                Pace("on" if speculate == "on" else "auto", draft_tokens),
                read_bytes=lambda: self.weights.read_bytes,
            )
        self.engine = Engine(
            self.model, ctx=self.ctx, pass_tokens=self.budget.pass_tokens, speculation=self.speculation
        )

    @property
    def root(self) -> Path:
        """The checkpoint's folder.

        Raises:
            SourceNotFoundError: It is on a server.
        """
        return self._checkpoint.root

    @property
    def offline(self) -> str | None:
        """Why the cache stands in for a server; None when it does not."""
        folder = self._checkpoint.folder
        return folder.offline if isinstance(folder, CachedFolder) else None

    def _plan(
        self, config: ModelConfig, *, ram: int | None, ctx: int | None, speculate: Speculate
    ) -> tuple[Budget, bool]:
        """Divide the memory, with the MTP layer where it is wanted and can be had; whether it is."""

        def plan(*, has_mtp: bool) -> Budget:
            sizes = measure(self.contents, config, self.io, self.mtp if has_mtp else None)
            return plan_memory(self.contents, config, sizes, ram=ram, ctx=ctx)

        self.idle_speculation = None
        if speculate != "off":
            self.idle_speculation = self.mtp.fault
            if self.idle_speculation is None and speculate == "auto" and self.contents.cache is not None:
                self.idle_speculation = "a wrong guess would fetch weights in vain; --speculate on allows that"
            if self.idle_speculation is None and kernels.library() is None:
                self.idle_speculation = (
                    "products are not compiled here, and in PyTorch's a row depends on those beside it; "
                    "install again where there is a C compiler"
                )
            if self.idle_speculation is None:
                try:
                    return plan(has_mtp=True), True
                except ResourceError as error:
                    if speculate == "on":
                        raise
                    self.idle_speculation = f"with the MTP layer {error}"
            elif speculate == "on":
                raise UnsupportedModelError(f"{self.name}: cannot speculate: {self.idle_speculation}")
        return plan(has_mtp=False), False

    def _most_used(self, usage: trace.Trace, config: ModelConfig) -> list[Key]:
        """The experts to pin: as many as leave a quarter of the window, and what a token needs, to the others."""
        layers = tuple(range(config.first_k_dense_replace, config.num_hidden_layers))
        if usage.model_type != config.model_type:
            raise ManifestError(f"the trace is of another model than {self.name}: of {usage.model_type!r:.60}")
        if (usage.layers, usage.experts) != (layers, config.n_routed_experts):
            raise ManifestError(f"the trace is of another model than {self.name}: it has other layers or experts")
        counts = {(layer, expert): n for layer, experts in usage.usage.items() for expert, n in experts.items()}
        slots = self.budget.slots
        room = slots - max(config.num_experts_per_tok, slots // 4)
        if room <= 0:
            raise ResourceError(f"only {slots} experts fit into memory: there is no room to pin any; give more --ram")
        return sorted(sorted(counts, key=lambda key: (-counts[key], key))[:room])

    @cached_property
    def text(self) -> Text:
        """The tokenizer; read on first use, because whoever works with ids needs none."""
        return Text.from_checkpoint(self._checkpoint)

    def speculation_document(self) -> dict[str, Any]:
        """What speculation did, for ``--json``; the keys are a promise."""
        found = {"state": "off", "reason": self.idle_speculation}
        if self.speculation is None:
            return found
        pace = self.speculation.pace
        return {"state": "on" if pace.is_always else "auto", "reason": None, **pace.to_document()}

    def sampling(self, **given: Any) -> SamplingParams:
        """How this model's makers sample, with what is given here (and is not None) in its place.

        Raises:
            ManifestError: generation_config.json has a value that cannot be used.
            ToolkitError: A given value cannot be used.
        """
        return choose_sampling(read_object(self._checkpoint.auxiliary, "generation_config.json"), given)

    def start(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int = MAX_TOKENS,
        sampling: SamplingParams | None = None,
        stops: Sequence[str] = (),
    ) -> Generation:
        """Prepare a continuation of these ids; it runs while it is iterated over.

        Raises:
            ResourceError: The ids do not fit into the context.
            ToolkitError: There are none, or one is outside the vocabulary.
        """
        return Generation(self, ids, max_tokens=max_tokens, sampling=sampling or self.sampling(), stops=stops)

    def generate(self, text: str, *, max_tokens: int = MAX_TOKENS, stops: Sequence[str] = (), **sampling: Any) -> str:
        """Continue a raw text and return what was added.

        Args:
            text: The prompt.
            max_tokens: The most tokens to add.
            stops: Texts that end it; they are not returned.
            **sampling: Fields of SamplingParams; the model's own defaults for those not given.

        Raises:
            ToolkitError: See start and sampling.
        """
        ids = self.text.encode(text)
        return "".join(self.start(ids, max_tokens=max_tokens, sampling=self.sampling(**sampling), stops=stops))

    def logits(self, text_or_ids: str | Sequence[int]) -> Tensor:
        """The logits after every position of a text or of ids, [T, V] float32.

        Raises:
            ResourceError: It does not fit into the context.
            ToolkitError: It is empty, or an id is outside the vocabulary.
        """
        ids = self.text.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
        return self.engine.logits(ids)


def choose_sampling(generation_config: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from generation_config.json, replaced by those given that are not None.

    As its readers agree: without ``do_sample: true`` the model is used greedily, whatever else it says; with it,
    a missing temperature is 1 and missing filters are off.

    Raises:
        ManifestError: The file has a value that cannot be used.
        ToolkitError: A given value cannot be used.
    """
    values: dict[str, Any] = {}
    if generation_config.get("do_sample") is True:
        values["temperature"] = 1.0
        for key in ("temperature", "top_k", "top_p", "min_p"):
            value = generation_config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int if key == "top_k" else int | float):
                raise ManifestError(f"generation_config.json has {key} {value!r:.60}; it must be a number")
            values[key] = value
        try:
            SamplingParams(**values)
        except ToolkitError as error:
            raise ManifestError(f"generation_config.json cannot be used: {error}") from error
    return SamplingParams(**values | {key: value for key, value in given.items() if value is not None})
