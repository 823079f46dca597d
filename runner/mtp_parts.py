"""What a checkpoint has of the MTP layer, and whether that can be run. Descriptions only; nothing is read.

Many checkpoints have none: DeepSeek-V2, Kimi-K2, and whatever transformers saved, where config.json may announce it all
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from manifests.checkpoint import Checkpoint
from manifests.names import Role, parse_name
from runner.config import ModelConfig
from runner.expected import mtp_copies, mtp_tensors

EQUAL, DIFFERENT, UNKNOWN, ABSENT = "equal", "different", "unknown", "absent"
"""How a copy of the embedding or head compares with the main model's: by digest, which original files do not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The MTP layer's own embedding or head.

    Attributes:
        name: Of the tensor.
        original: Name of the main model's.
        state: One of EQUAL, DIFFERENT, UNKNOWN, ABSENT.
        size: Bytes; 0 when absent.
    """

    name: str
    original: str
    state: str
    size: int

    @property
    def used(self) -> str:
        """The name of the tensor to use: the original, unless the copy may differ from it."""
        return self.name if self.state in (DIFFERENT, UNKNOWN) else self.original


class MtpParts:
    """The MTP layer of a checkpoint, as far as it is there.

    Attributes:
        layer: Its number.
        claimed: MTP layers that config.json announces; only the first of several is looked at.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.layer = config.num_hidden_layers
        self.claimed = config.num_nextn_predict_layers
        self._checkpoint = checkpoint
        self._config = config

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each of the layer's tensors that is there, scales and copies included, by name."""
        prefix = f"model.layers.{self.layer}."
        files = self._checkpoint.manifest.files
        return {one.name: one.size for file in files for one in file.tensors if one.name.startswith(prefix)}

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Names of tensors that it needs and that are not there."""
        return tuple(name for name, _ in mtp_tensors(self._config, self.sizes) if name not in self.sizes)

    @cached_property
    def copies(self) -> tuple[Copy, Copy]:
        """Of the embedding, and of the head."""
        embedding, head = (self._copy(name, original) for name, original in mtp_copies(self._config).items())
        return embedding, head

    @property
    def fault(self) -> str | None:
        """Why the layer cannot be run; None when it can."""
        if self.missing and not any(parse_name(name).role is Role.MTP for name in self.sizes):
            if not self.claimed:
                return "this model has no MTP layer"
            return (
                "config.json announces an MTP layer, but its tensors are not in this checkpoint; "
                "some tools leave them out when they save a model"
            )
        if self.missing:
            return f"{len(self.missing)} tensors of the MTP layer are missing, first {self.missing[0]}"
        for name, shape in mtp_tensors(self._config, self.sizes):
            found = self._checkpoint.shape(name)
            if found != shape:
                return f"{name} has shape {list(found or ())}, but config.json asks for {list(shape)}"
        return None

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of its routed experts, of its copies, and of the rest."""
        found = {"experts": 0, "copies": 0, "dense": 0}
        for name, size in self.sizes.items():
            role = parse_name(name).role
            copies = role in (Role.MTP_EMBEDDING, Role.MTP_HEAD)
            found["experts" if role is Role.ROUTED_EXPERT else "copies" if copies else "dense"] += size
        return found

    def to_document(self) -> dict[str, Any]:
        """For ``--json``; the keys are a promise."""
        return {
            "layer": self.layer,
            "announced": self.claimed,
            "tensors": len(self.sizes),
            "missing": list(self.missing),
            "fault": self.fault,
            "bytes": self.bytes_by_kind,
            "copies": [
                {"name": one.name, "of": one.original, "state": one.state, "bytes": one.size} for one in self.copies
            ],
        }

    def _copy(self, name: str, original: str) -> Copy:
        if name not in self.sizes:
            return Copy(name=name, original=original, state=ABSENT, size=0)
        mine, others = self._checkpoint.digest(name), self._checkpoint.digest(original)
        state = UNKNOWN if mine is None or others is None else EQUAL if mine == others else DIFFERENT
        return Copy(name=name, original=original, state=state, size=self.sizes[name])
