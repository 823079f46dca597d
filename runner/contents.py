"""Which tensors of a checkpoint are read together: a layer's dense part, a routed expert, the head.

Names and sizes only; nothing is read, and no memory is taken. This file must not know what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from manifests.auxiliary import Auxiliary
from manifests.checkpoint import Checkpoint, Location
from manifests.errors import IncompleteError, ManifestError
from manifests.names import expert_prefix
from manifests.schema import PLAIN
from runner import split_kv
from runner.cache_folder import CacheFolder
from runner.layout import HUGE_PAGE_BYTES, PAGE_BYTES, Layout, lay_out
from runner.mirror import own_bytes
from runner.pieces import cut, disk_bytes, touched
from runner.policy import Key
from runner.reading import Files
from runner.remote_files import RemoteFiles
from runner.remote_folder import CachedFolder

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_LAYERS = "model.layers."
_EXPERTS = ".mlp.experts."
# Copies of model.embed_tokens and lm_head that MTP layers have: 3.7 GB in DeepSeek-V3, which few need.
_APART = (".embed_tokens.", ".shared_head.head.")


def group_of(name: str) -> str:
    """The group that a tensor is read with: its layer, its expert, or its own name without the last part.

    What another tensor is made of is apart, in a group with that one's name, and can be let go when it is made.
    """
    if (whole := split_kv.whole_of(name)) is not None:
        return whole.rpartition(".")[0]
    if name.startswith(_LAYERS) and not any(part in name for part in _APART):
        if (found := name.find(_EXPERTS)) > 0:
            return name[: name.find(".", found + len(_EXPERTS))]
        return name[: name.find(".", len(_LAYERS))]
    return name.rpartition(".")[0]


def pass_order(layers: int, head: str = "lm_head") -> list[str]:
    """The groups that one pass through a model of so many layers uses, in its order, without routed experts."""
    return [*(f"{_LAYERS}{layer}" for layer in range(layers)), "model.norm", head]


def mtp_order(layer: int, head: str) -> list[str]:
    """The groups that the MTP layer uses behind it, with a head that has this tensor."""
    own = group_of(head)
    return [f"{_LAYERS}{layer}", *([own] if own.startswith(_LAYERS) else [])]


class Contents:
    """The tensors of a checkpoint in groups."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __str__(self) -> str:
        """The checkpoint's name for messages."""
        return str(self._checkpoint.folder)

    @property
    def auxiliary(self) -> Auxiliary:
        """The checkpoint's small files."""
        return self._checkpoint.auxiliary

    @property
    def cache(self) -> CacheFolder | None:
        """What keeps the files that a server has; None for files of this machine."""
        folder = self._checkpoint.folder
        return folder.cache if isinstance(folder, CachedFolder) else None

    def open_files(self) -> Files | RemoteFiles:
        """The checkpoint's files, each of which must stay what it is now, or when it is first fetched."""
        folder, files = self._checkpoint.folder, self._checkpoint.manifest.files
        if isinstance(folder, CachedFolder):
            return RemoteFiles(folder, files)
        return Files(self._checkpoint.root, {file.path: file.size for file in files}, self._checkpoint.path)

    @property
    def is_in_place(self) -> bool:
        """Whether these are the original files, where an expert has no file of its own."""
        return self._checkpoint.manifest.layout != "resharded"

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def locate(self, name: str) -> Location:
        """Where a tensor is.

        Raises:
            ManifestError: The checkpoint has none of that name.
            IncompleteError: It is a part of one, and that has none.
            SourceNotFoundError, UnsupportedModelError: See `Checkpoint.find`.
        """
        location = self._checkpoint.find(name)
        if location is None:
            missing = f"{self}: has no tensor {name}"
            if not self._checkpoint.manifest.selection.is_everything:
                raise IncompleteError(f"{missing}, only a part was resharded")
            raise ManifestError(missing)
        return location

    def encoding(self, name: str) -> str:
        """What a tensor's bytes encode; ``plain`` for numbers."""
        return self._encodings.get(name, PLAIN)

    def group(self, group: str) -> Layout:
        """How a group lies in memory; empty for one that the checkpoint does not have."""
        names = self._expert_names(_expert_of(group)) if _EXPERTS in group else self._names.get(group, ())
        return lay_out(map(self.locate, names))

    def expert(self, key: Key, alignment: int) -> Layout:
        """How a routed expert lies in memory.

        Raises:
            ManifestError: A weight is not in the checkpoint.
        """
        return lay_out(map(self.locate, self._expert_names(key)), alignment=alignment)

    def expert_bytes(self, layers: Iterable[int]) -> int:
        """Bytes of the largest routed expert of these layers."""
        # Experts of one layer have one shape.
        sizes = (sum(self._sizes.get(name, 0) for name in self._expert_names((layer, 0))) for layer in layers)
        return max(sizes, default=0)

    def expert_parts(self, layers: Iterable[int]) -> int:
        """Parts of files that a routed expert of these layers is in: one of most shards, three of a GGUF file."""
        names = (self._expert_names((layer, 0)) for layer in layers)
        found = (lay_out(self.locate(name) for name in some if name in self).runs for some in names)
        return max(map(len, found), default=0)

    def slot_bytes(self, layers: Iterable[int], alignment: int) -> int:
        """Addresses that hold any routed expert of these layers, in a layout of this alignment."""
        # In original files an expert may be in as many parts as it has tensors.
        parts = 2 * len(_PROJECTIONS) if self.is_in_place else 1
        return self.expert_bytes(layers) + parts * (alignment + max(alignment, PAGE_BYTES))

    def with_halves(self, groups: Iterable[str]) -> list[str]:
        """These groups, each with the halves behind it that one of its tensors is made of."""
        return [one for group in groups for one in (group, self._halves.get(group)) if one is not None]

    def stored_bytes(self, groups: Sequence[str]) -> int:
        """Bytes that are read to have these groups in memory."""
        return sum(self.group(group).needed_bytes for group in self.with_halves(groups))

    def used_bytes(self, groups: Sequence[str]) -> int:
        """Bytes of these groups that products read: of what is made of halves, that and not the halves."""
        return sum(self.group(group).needed_bytes + self._joined_bytes(group) for group in groups)

    def dense_bytes(self, groups: Sequence[str]) -> int:
        """Memory that these groups take together, each in huge pages of its own, and what is made of halves."""
        kept = sum(self._group_bytes(group) + self._joined_bytes(group) for group in groups)
        # Of the halves no more than those that are being joined, and the next, which are read ahead.
        halves = sorted(self._group_bytes(self._halves[group]) for group in groups if group in self._halves)
        return kept + sum(halves[-2:])

    def kept_bytes(self, groups: Sequence[str]) -> int:
        """What these groups take of a cache at most, with the tables of the files that they are in."""
        files = {file.path: file for file in self._checkpoint.manifest.files}
        runs = [run for group in groups for run in self.group(group).runs]
        total = 0
        for path in {run.file for run in runs}:
            pieces = cut(files[path])
            found = {number for run in runs if run.file == path for number in touched(pieces, run.begin, run.end)}
            total += own_bytes(len(pieces)) + sum(disk_bytes(pieces[number]) for number in found)
        return total

    def _group_bytes(self, group: str) -> int:
        size = sum(self._sizes[name] + PAGE_BYTES for name in self._names.get(group, ()))
        return -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES

    def _joined_bytes(self, group: str) -> int:
        if (halves := self._halves.get(group)) is None:
            return 0
        return split_kv.joined_bytes(*(self.locate(name).logical_shape for name in self._names[halves]))

    def _expert_names(self, key: Key) -> list[str]:
        prefix = expert_prefix(*key)
        weights = [f"{prefix}{projection}.weight" for projection in _PROJECTIONS]
        return weights + [scales for name in weights if (scales := f"{name}_scale_inv") in self._sizes]

    @cached_property
    def _halves(self) -> dict[str, str]:
        """By group, that of the halves of one of its tensors."""
        wholes = {group: f"{group}.weight" for group in self._names}
        return {group_of(whole): group for group, whole in wholes.items() if split_kv.halves(whole, self) is not None}

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {tensor.name: tensor.size for file in self._checkpoint.manifest.files for tensor in file.tensors}

    @cached_property
    def _encodings(self) -> dict[str, str]:
        files = self._checkpoint.manifest.files
        return {one.name: one.encoding for file in files for one in file.tensors if one.encoding != PLAIN}

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self._sizes:
            if _EXPERTS not in name:  # nearly all are, and their names are known
                names.setdefault(group_of(name), []).append(name)
        return names


def _expert_of(group: str) -> Key:
    layer, _, expert = group.removeprefix(_LAYERS).partition(_EXPERTS)
    return int(layer), int(expert)
