"""Any checkpoint as tensors with locations: a resharded folder, a plain folder of shards, GGUF files, one file.

A checkpoint that was not resharded is described in place: the same `Manifest` type, made from headers. So whoever reads
tensors needs one kind of description, wherever the bytes lie. Opening reads headers or the manifest, never a tensor.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from manifests import gguf_files
from manifests.auxiliary import Auxiliary
from manifests.errors import IncompleteError, ManifestError, Problem, SourceNotFoundError, UnsupportedModelError
from manifests.ggml import BLOCK_TYPES
from manifests.header import MAX_FILE_BYTES, Header, read_header
from manifests.in_place import describe_in_place
from manifests.jsontext import read_json
from manifests.mapping import map_file
from manifests.names import expert_prefix, find_missing_scales, parse_name
from manifests.paths import ASIDE_NAME, INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME
from manifests.readable import NOT_FOUND
from manifests.safety import check_relative, resolve_inside
from manifests.schema import PLAIN, FileEntry, Manifest, ModelFacts, TensorEntry
from manifests.storage import load

CONFIG_NAME = "config.json"
SUFFIX = ".safetensors"
_ENCODINGS = frozenset(block_type.name for block_type in BLOCK_TYPES.values() if block_type.dtype is None)
MAX_CONFIG_BYTES = 10_000_000
MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """One tensor and where its bytes lie.

    Attributes:
        name: Tensor name.
        path: Absolute path of the file.
        file: The file's path relative to the checkpoint.
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
    path: Path
    file: str
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    encoding: str = PLAIN
    logical_shape: tuple[int, ...]
    codec: str
    unpacked_size: int


class TensorView:
    """A tensor's bytes without torch: dtype tag, shape, and the mapped bytes as a read-only memoryview."""

    __slots__ = ("_map", "location")

    def __init__(self, location: Location, map_file: Callable[[], memoryview]) -> None:
        self.location = location
        self._map = map_file

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
        """The raw bytes, mapped from the file on first use and read from disk page by page as they are touched.

        Raises:
            SourceNotFoundError, IntegrityError, ResourceError: See `manifests.mapping.map_file`.
        """
        if self.location.size == 0:
            return memoryview(b"")
        return self._map()[self.location.offset : self.location.offset + self.location.size]


class Checkpoint:
    """A checkpoint that was opened: its manifest, its config, and the way to each tensor.

    Args:
        root: Its folder.
        manifest: What it holds.
        config: Gives its config where that is not the folder's config.json.
        auxiliary: Its small files where not all of them are the folder's own.

    Attributes:
        root: As given.
        manifest: As given.
        auxiliary: Its small files: tokenizer and settings.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        config: Callable[[], Mapping[str, Any]] | None = None,
        auxiliary: Auxiliary | None = None,
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.auxiliary = auxiliary or Auxiliary(root)
        self._read_config = config or partial(read_config, root)
        self._paths: dict[str, Path] = {}

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
            raise UnsupportedModelError(f"{self.root}: {fault}")
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

    def map_file(self, file: str) -> memoryview:
        """All bytes of one file, mapped read-only; see `manifests.mapping`. Path as in `Location.file`."""
        return map_file(self._path(file), self._file_sizes[file])

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

    def expert(self, layer: int, expert: int) -> dict[str, TensorView]:
        """One routed expert as torch-free views by short name: ``gate_proj.weight`` and so on.

        Raises:
            SourceNotFoundError: The checkpoint has no such expert.
        """
        found = self._by_layer.get(layer, {}).get(expert)
        if found is None:
            raise SourceNotFoundError(f"{self.root}: has no expert {expert} in layer {layer}")
        return self._views(found, expert_prefix(layer, expert))

    def dense(self, layer: int) -> dict[str, TensorView]:
        """One layer's tensors without its routed experts, by name within the layer.

        Raises:
            SourceNotFoundError: The checkpoint has no such layer.
        """
        found = self._by_layer.get(layer, {}).get(None)
        if found is None:
            raise SourceNotFoundError(f"{self.root}: has no layer {layer}")
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
        # One mapping for all views of a file, made when the first of them is read.
        maps = {location.file: cache(partial(self.map_file, location.file)) for location in locations}
        return {location.name.removeprefix(prefix): TensorView(location, maps[location.file]) for location in locations}

    def missing_scales(self) -> list[str]:
        """Names of FP8 weights without their block scales; see `manifests.names.find_missing_scales`."""
        return find_missing_scales((name, tensor.dtype) for name, (_, tensor) in self._entries.items())

    def _path(self, file: str) -> Path:
        path = self._paths.get(file)
        if path is None:
            # Links are followed once for each file, not for each of its tensors.
            try:
                path = self._paths[file] = resolve_inside(self.root, file)
            except SourceNotFoundError as error:
                resharded = "`reshard verify` tells more, `reshard repair` brings it back"
                advice = resharded if self.manifest.layout == "resharded" else "download it again"
                raise SourceNotFoundError(f"{error}; {advice}") from error
        return path

    def _location(self, file: FileEntry, tensor: TensorEntry) -> Location:
        return Location(
            name=tensor.name,
            path=self._path(file.path),
            file=file.path,
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


def open(path: str | Path) -> Checkpoint:
    """Open a resharded checkpoint, a plain checkpoint folder, a GGUF model, or one ``.safetensors`` or ``.gguf`` file.

    A folder with a manifest or with safetensors files is that, whatever GGUF files are beside them. One file of a split
    GGUF model is described alone, as one shard is.

    Raises:
        SourceNotFoundError: Nothing of the kind is there, or a shard is missing.
        IncompleteError: It is being written, or was when its writer was stopped.
        ManifestError: The manifest, the index or a header is invalid, or they contradict each other.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == gguf_files.SUFFIX:
            return _open_gguf(path.parent, gguf_files.read_file(path))
        if path.suffix != SUFFIX:
            raise SourceNotFoundError(f"{path}: not a {SUFFIX} or {gguf_files.SUFFIX} file and not a folder")
        return Checkpoint(path.parent, describe_in_place({path.name: read_header(path)}, ModelFacts()))
    if not path.is_dir():
        raise SourceNotFoundError(f"{path}: no such file or folder")
    if (path / MANIFEST_NAME).exists():
        return Checkpoint(path, load(path))
    check_finished(path)
    if names := find_gguf(path):
        return _open_gguf(path, gguf_files.read_folder(path, names))
    shards = read_shards(path)
    return Checkpoint(path, describe_in_place(shards, model_facts(read_config(path))))


def open_set(path: Path) -> Checkpoint:
    """As `open_model` where all files of a set are there; one of them alone is worth having, too.

    Raises:
        SourceNotFoundError, IncompleteError, ManifestError: See `open`.
    """
    names = gguf_files.set_names(path.name)
    if len(names) > 1 and all((path.parent / name).is_file() for name in names):
        return _open_gguf(path.parent, gguf_files.read_folder(path.parent, names))
    return open(path)


def open_model(path: str | Path) -> Checkpoint:
    """As `open`, but one file of a split GGUF model stands for all of them."""
    path = Path(path)
    if path.suffix == gguf_files.SUFFIX and path.is_file():
        return _open_gguf(path.parent, gguf_files.read_set(path))
    return open(path)


def find_gguf(folder: Path) -> list[str]:
    """Names of the GGUF files of a folder, sorted; none where it has safetensors, for it is then that checkpoint's."""
    if (folder / INDEX_NAME).exists() or any(entry.suffix == SUFFIX for entry in folder.iterdir()):
        return []
    return gguf_files.find_gguf(folder)


def _open_gguf(root: Path, model: gguf_files.GgufModel) -> Checkpoint:
    try:
        facts = model_facts(model.config() or {"model_type": model.architecture})
    except (ManifestError, UnsupportedModelError):
        # Said to whoever asks for the config; what tensors there are can be told without it.
        facts = model_facts({"model_type": model.architecture})
    auxiliary = Auxiliary(root, model.auxiliary, derived_from=len(next(iter(model.shards.values())).raw))
    return Checkpoint(root, describe_in_place(model.shards, facts), model.config, auxiliary)


def check_finished(folder: Path) -> None:
    """Refuse a folder without a manifest that a run or a restore is writing or taking apart.

    Raises:
        IncompleteError: With what finishes it.
    """
    if (folder / JOURNAL_NAME).exists():
        raise IncompleteError(f"{folder}: is not finished; the same `reshard` command that began it goes on with it")
    if (folder / ASIDE_NAME).exists():
        raise IncompleteError(
            f"{folder}: is being taken apart by `reshard restore --consume`; the same command goes on with it"
        )


def read_shards(root: Path, absent: Mapping[str, Header] | None = None) -> dict[str, Header]:
    """The headers of a plain checkpoint's shards, by relative path in source order, checked against its index.

    Source order is the numeric order of names: Kimi-K2's ``model-2-of-61`` stands before ``model-10-of-61``.

    Args:
        root: The checkpoint's folder.
        absent: Headers of shards that need not be there any more.

    Raises:
        SourceNotFoundError: No checkpoint here, or shards of the index are missing.
        ManifestError: Index and shards contradict each other, or one of them is invalid.
    """
    absent = absent or {}
    weight_map = _read_weight_map(root)
    if weight_map is None and absent:
        return dict(absent)
    if weight_map is None:
        names = sorted(entry.name for entry in root.iterdir() if entry.suffix == SUFFIX and entry.is_file())
        if not names:
            raise SourceNotFoundError(
                f"{root}: no {MANIFEST_NAME}, no {INDEX_NAME} and no {SUFFIX} or {gguf_files.SUFFIX} file here"
            )
        if len(names) > 1:
            raise SourceNotFoundError(
                f"{root}: {len(names)} {SUFFIX} files but no {INDEX_NAME}; download the index, or name one file"
            )
        return {names[0]: read_header(resolve_inside(root, names[0]))}
    names = sorted(set(weight_map.values()), key=_numeric_order)
    missing = [name for name in names if name not in absent and not _is_file(root / name)]
    if missing:
        used_up = ", or use the folder that `reshard run --consume` made of them" if len(missing) == len(names) else ""
        raise SourceNotFoundError(
            f"{root}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}; download them{used_up}"
        )
    shards = {name: absent.get(name) or read_header(resolve_inside(root, name)) for name in names}
    _check_index(root, weight_map, shards)
    return shards


def _is_file(path: Path) -> bool:
    """As os.path.isfile, which also takes a failing disk for an absent file."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in NOT_FOUND:
            return False
        raise


def read_config(root: Path) -> Mapping[str, Any]:
    """config.json of a folder; empty when it has none.

    Raises:
        ManifestError: It is not a JSON object.
    """
    if not (root / CONFIG_NAME).exists():
        return {}
    path = resolve_inside(root, CONFIG_NAME)
    config = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ManifestError(f"{path}: must be a JSON object")
    return config


def model_facts(config: Mapping[str, Any]) -> ModelFacts:
    """The values that counting needs; what is absent or no whole number is None."""

    def count(key: str) -> int | None:
        value = config.get(key)
        return value if type(value) is int and 0 <= value <= MAX_FILE_BYTES else None

    model_type = config.get("model_type")
    return ModelFacts(
        model_type=model_type if isinstance(model_type, str) and 0 < len(model_type) <= 100 else None,
        num_hidden_layers=count("num_hidden_layers"),
        n_routed_experts=count("n_routed_experts"),
        num_experts_per_tok=count("num_experts_per_tok"),
    )


def _read_weight_map(root: Path) -> dict[str, str] | None:
    if not (root / INDEX_NAME).exists():
        return None
    path = resolve_inside(root, INDEX_NAME)
    index = read_json(path, max_bytes=MAX_INDEX_BYTES)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ManifestError(f"{path}: has no weight_map of tensor names to shards")
    for shard in set(map(str, weight_map.values())):
        check_relative(shard, what=str(path))
        if not shard.endswith(SUFFIX):
            raise ManifestError(f"{path}: {shard!r:.200} in weight_map is not a {SUFFIX} file")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ManifestError(f"{path}: weight_map must map names to file names")
    return weight_map


def _check_index(root: Path, weight_map: Mapping[str, str], shards: Mapping[str, Header]) -> None:
    problems = []
    names = {shard: {tensor.name for tensor in header.tensors} for shard, header in shards.items()}
    for name, shard in weight_map.items():
        if name not in names[shard]:
            problems.append(f"the index says {name!r:.200} is in {shard}, which does not have it")
    for shard, found in names.items():
        for name in found:
            if name not in weight_map:
                problems.append(f"{shard} has {name!r:.200}, which the index does not name")
            elif weight_map[name] != shard:
                problems.append(f"{shard} has {name!r:.200}, which the index says is in {weight_map[name]}")
    if problems:
        problems.sort()
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ManifestError(
            f"{root}: {problems[0]}{more}; index and shards are not of one checkpoint",
            [Problem(loc="weight_map", kind="inconsistent", message=problem) for problem in problems],
        )


def _numeric_order(name: str) -> tuple[list[tuple[int, str]], str]:
    # Every second part is digits. The name itself decides between model-1 and model-01, which are equal as numbers.
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)], name
