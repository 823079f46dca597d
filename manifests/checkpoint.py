"""A checkpoint that was opened: its tensors with their locations, its config, and views of their bytes.

Whoever reads tensors needs one kind of description, wherever the bytes lie: in a folder here or on a server, in
resharded files or in the original ones. This file knows descriptions; how they come about is `manifests.inventory`'s.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from manifests.auxiliary import Auxiliary
from manifests.config import read_config
from manifests.errors import SourceNotFoundError, UnsupportedModelError
from manifests.folder import Cut, Folder, LocalFolder
from manifests.ggml import BLOCK_TYPES
from manifests.names import expert_prefix, find_missing_scales, parse_name
from manifests.schema import PLAIN, FileEntry, Manifest, TensorEntry

_ENCODINGS = frozenset(block_type.name for block_type in BLOCK_TYPES.values() if block_type.dtype is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """One tensor and where its bytes lie.

    Attributes:
        name: Tensor name.
        file: The file's path relative to the checkpoint.
        place: The file's absolute path, or its address.
        offset: First byte in the file.
        size: Bytes.
        dtype: safetensors tag.
        shape: Stored shape.
        encoding: ``plain``, or the quantised block type whose bytes the elements are.
        logical_shape: Shape of the matrix that the bytes encode; the stored shape when plain.
        codec: ``none``, or how the whole file is compressed; the offset then counts in the unpacked file.
        unpacked_size: Bytes of the whole file when unpacked.
    """

    name: str
    file: str
    place: str
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    encoding: str = PLAIN
    logical_shape: tuple[int, ...]
    codec: str
    unpacked_size: int


class TensorView:
    """A tensor's bytes without torch: dtype tag, shape, and the bytes as a read-only memoryview."""

    __slots__ = ("_cut", "location")

    def __init__(self, location: Location, cut: Cut) -> None:
        self.location = location
        self._cut = cut

    def __repr__(self) -> str:
        return f"TensorView({self.location.name!r}, {self.dtype}, {list(self.shape)})"

    @property
    def dtype(self) -> str:
        """The safetensors tag, such as ``F8_E4M3``."""
        return self.location.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return self.location.shape

    @property
    def data(self) -> memoryview:
        """The raw bytes: mapped from the file on first use and read page by page as they are touched, or fetched.

        Raises:
            SourceNotFoundError, IntegrityError, ResourceError: See `manifests.mapping.map_file`.
            RemoteError: The server that has them cannot be reached.
        """
        if self.location.size == 0:
            return memoryview(b"")
        return self._cut(self.location.offset, self.location.offset + self.location.size)


class Checkpoint:
    """A checkpoint that was opened: its manifest, its config, and the way to each tensor.

    Args:
        folder: Where its files are.
        manifest: What it holds.
        config: Gives its config where that is not the folder's config.json.
        auxiliary: Its small files where not all of them are the folder's own.

    Attributes:
        folder: As given.
        manifest: As given.
        auxiliary: Its small files: tokenizer and settings.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        config: Callable[[], Mapping[str, Any]] | None = None,
        auxiliary: Auxiliary | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.auxiliary = auxiliary or Auxiliary(folder)
        self._read_config = config or partial(read_config, folder)
        self._places: dict[str, str] = {}

    @property
    def root(self) -> Path:
        """The path of its folder.

        Raises:
            SourceNotFoundError: It is not on this machine.
        """
        if not isinstance(self.folder, LocalFolder):
            raise SourceNotFoundError(f"{self.folder}: is not on this machine, and this needs its files; download it")
        return self.folder.root

    def path(self, file: str) -> Path:
        """The path of one of its files.

        Raises:
            ManifestError: It leaves the checkpoint.
            SourceNotFoundError: It is gone, or is not on this machine.
        """
        return self.root if not isinstance(self.folder, LocalFolder) else self.folder.path(file)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, or what a GGUF file says in place of it; empty when the checkpoint has none.

        Raises:
            ManifestError: It is not a JSON object, or the GGUF metadata has values of the wrong type.
            UnsupportedModelError: The GGUF metadata has what is not known; see `manifests.gguf_config`.
        """
        return self._read_config()

    def tensors(self) -> Iterator[Location]:
        """All tensors in the order of files and offsets."""
        for file, tensor in self._entries.values():
            yield self._location(file, tensor)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def find(self, name: str) -> Location | None:
        """The tensor of this name, ready to be read, or None.

        Raises:
            ManifestError: Its file's path leaves the checkpoint.
            SourceNotFoundError: Its file is gone.
            UnsupportedModelError: Its bytes are stored in a way that only other tools read.
        """
        found = self._entries.get(name)
        if found is not None and (fault := _unreadable(*found)):
            raise UnsupportedModelError(f"{self.folder}: {fault}")
        return self.locate(name)

    def locate(self, name: str) -> Location | None:
        """The tensor of this name however its bytes are stored, or None. Who reads it looks at the codec.

        Raises:
            ManifestError, SourceNotFoundError: See `find`.
        """
        found = self._entries.get(name)
        return None if found is None else self._location(*found)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of what a tensor stands for, however it is stored; None when there is none of this name."""
        found = self._entries.get(name)
        return None if found is None else found[1].logical_shape

    def digest(self, name: str) -> str | None:
        """The digest of a tensor; None for original files, which have none, and when there is none of this name."""
        found = self._entries.get(name)
        return None if found is None else found[1].digest

    def unreadable(self) -> list[str]:
        """A sentence for each kind of storage that only other tools read; empty when every tensor can be read."""
        faults = (_unreadable(file, tensor) for file, tensor in self._entries.values())
        return list(dict.fromkeys(fault for fault in faults if fault))

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have tensors here, MTP layers included."""
        return tuple(sorted(self._by_layer))

    def experts(self, layer: int) -> tuple[int, ...]:
        """Numbers of the routed experts of one layer."""
        return tuple(sorted(expert for expert in self._by_layer.get(layer, {}) if expert is not None))

    def tensor(self, name: str) -> TensorView:
        """One tensor as a torch-free view.

        Raises:
            SourceNotFoundError: The checkpoint has none of this name.
        """
        if name not in self:
            raise SourceNotFoundError(f"{self.folder}: has no tensor {name}")
        return self._views([name], "")[name]

    def expert(self, layer: int, expert: int) -> dict[str, TensorView]:
        """One routed expert as torch-free views by short name: ``gate_proj.weight`` and so on.

        Raises:
            SourceNotFoundError: The checkpoint has no such expert.
        """
        found = self._by_layer.get(layer, {}).get(expert)
        if found is None:
            raise SourceNotFoundError(f"{self.folder}: has no expert {expert} in layer {layer}")
        return self._views(found, expert_prefix(layer, expert))

    def dense(self, layer: int) -> dict[str, TensorView]:
        """One layer's tensors without its routed experts, by name within the layer.

        Raises:
            SourceNotFoundError: The checkpoint has no such layer.
        """
        found = self._by_layer.get(layer, {}).get(None)
        if found is None:
            raise SourceNotFoundError(f"{self.folder}: has no layer {layer}")
        return self._views(found, f"model.layers.{layer}.")

    @cached_property
    def _entries(self) -> dict[str, tuple[FileEntry, TensorEntry]]:
        return {tensor.name: (file, tensor) for file in self.manifest.files for tensor in file.tensors}

    @cached_property
    def _file_sizes(self) -> dict[str, int]:
        return {file.path: file.size for file in self.manifest.files}

    @cached_property
    def _by_layer(self) -> dict[int, dict[int | None, list[str]]]:
        """Names by layer and expert; those of the dense part are under None."""
        found: dict[int, dict[int | None, list[str]]] = {}
        for text in self._entries:
            name = parse_name(text)
            if name.layer is not None:
                found.setdefault(name.layer, {}).setdefault(name.expert, []).append(text)
        return found

    def _views(self, names: list[str], prefix: str) -> dict[str, TensorView]:
        locations = [location for name in names if (location := self.find(name)) is not None]
        cuts = {file: self.folder.view(file, self._file_sizes[file]) for file in {one.file for one in locations}}
        return {location.name.removeprefix(prefix): TensorView(location, cuts[location.file]) for location in locations}

    def missing_scales(self) -> list[str]:
        """Names of FP8 weights without their block scales; see `manifests.names.find_missing_scales`."""
        return find_missing_scales((name, tensor.dtype) for name, (_, tensor) in self._entries.items())

    def _place(self, file: str) -> str:
        # Asked once for each file, not for each of its tensors.
        if (place := self._places.get(file)) is not None:
            return place
        try:
            self.folder.require(file)
        except SourceNotFoundError as error:
            resharded = "`reshard verify` tells more, `reshard repair` brings it back"
            advice = resharded if self.manifest.layout == "resharded" else "download it again"
            raise SourceNotFoundError(f"{error}; {advice}") from error
        place = self._places[file] = self.folder.where(file)
        return place

    def _location(self, file: FileEntry, tensor: TensorEntry) -> Location:
        return Location(
            name=tensor.name,
            file=file.path,
            place=self._place(file.path),
            offset=tensor.offset,
            size=tensor.size,
            dtype=tensor.dtype,
            shape=tensor.shape,
            encoding=tensor.encoding,
            logical_shape=tensor.logical_shape,
            codec=file.codec,
            unpacked_size=file.unpacked_size,
        )


def _unreadable(file: FileEntry, tensor: TensorEntry) -> str | None:
    if file.codec != "none":
        return f"{file.path} is stored compressed ({file.codec}) and cannot be mapped; `reshard unpack` undoes that"
    if tensor.encoding != PLAIN and tensor.encoding not in _ENCODINGS:
        return f"{tensor.name} is encoded as {tensor.encoding}; this version knows plain tensors and ggml's block types"
    return None
