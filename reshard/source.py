"""What there is to reshard: shards with their headers, the index, config and auxiliary files of a folder.

Shards are safetensors files or GGUF files, which have config and tokenizer inside.
Reads headers and folder listings, never a tensor. What is found here is complete; the plan decides from it alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manifests import gguf_files, gguf_headers, gguf_tokenizer, hub, urls
from manifests.config import CONFIG_NAME, read_config
from manifests.errors import ManifestError, SourceNotFoundError, UnsupportedModelError
from manifests.folder import Folder, LocalFolder
from manifests.header import Header
from manifests.inventory import check_finished, find_gguf, read_shards
from manifests.paths import INDEX_NAME, MANIFEST_NAME
from manifests.questions import Watch
from manifests.remote import RemoteFolder, find, is_resharded, read_index, read_indexed
from manifests.remote import find_gguf as find_remote_gguf
from manifests.safety import require_folder
from manifests.shards import MAX_INDEX_BYTES
from reshard.generated import config_document
from reshard.places import Place
from reshard.small_files import AuxiliaryFile, list_small
from reshard.web import place_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheckpoint:
    """A checkpoint in its published form.

    Attributes:
        place: Its folder.
        file: The GGUF file in it that was named, so that nothing else is taken but the rest of its set; None when the
            folder was.
        kind: What its shards are, one of `manifests.schema.SOURCE_KINDS`.
        shards: Headers by relative path, in source order.
        index: The bytes of model.safetensors.index.json; None when there is a single file without one.
        config: config.json, or what GGUF files say in its place.
        auxiliary: Files to copy as they are, sorted by path.
        generated: Files that are made, by path, because a GGUF file has inside what they would say.
        left_out: What is not copied, each with its reason.
    """

    place: Place
    file: str | None = None
    kind: str = "safetensors"
    shards: Mapping[str, Header]
    index: bytes | None
    config: Mapping[str, Any]
    auxiliary: tuple[AuxiliaryFile, ...]
    generated: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...]

    @property
    def name(self) -> str:
        """What was named, for messages."""
        return str(self.place) if self.file is None else self.place.where(self.file)

    @property
    def path(self) -> Path | None:
        """The path of what was named; None when it is not on this machine."""
        return None if self.place.root is None else Path(self.place.root, self.file or "")

    @property
    def root(self) -> Path:
        """The path of its folder.

        Raises:
            SourceNotFoundError: It is not on this machine.
        """
        if self.place.root is None:
            raise SourceNotFoundError(f"{self.place}: is not on this machine, and this needs its files; download it")
        return self.place.root


def local_path(source: Path | str) -> Path | None:
    """The path of a source on this machine; None for the address of one that is not.

    A repository of the Hub is on this machine when it was downloaded and the Hub must not be asked.

    Raises:
        SourceNotFoundError: It must not be asked, and the repository was not downloaded.
    """
    if isinstance(source, Path):
        return source
    return hub.downloaded(source) if urls.is_hub(source) and hub.is_offline(source) else None


def source_root(source: Path | str) -> Path | None:
    """The folder of a source that is named by its folder or by a GGUF file, which may have been used up.

    None when it is not on this machine.
    """
    path = local_path(source)
    if path is None:
        return None
    return path.parent if path.suffix == gguf_files.SUFFIX and not path.is_dir() else path


def read_source(
    source: Path | str, freed: Mapping[str, Header] | None = None, watch: Watch | None = None
) -> SourceCheckpoint:
    """Look at a checkpoint.

    Args:
        source: Its folder, or a GGUF file; or the address of one of these.
        freed: Headers of shards that an earlier run used up, so that they are not there any more.
        watch: Is told how far the headers are that a server is asked for.

    Raises:
        SourceNotFoundError: There is no checkpoint, or shards are missing.
        IncompleteError: The folder is being restored.
        ManifestError: Index, config or a header is invalid, or the folder is already resharded.
        RemoteError: A server cannot be reached, or does not do what is asked.
    """
    path, root, freed = local_path(source), source_root(source), freed or {}
    if path is None or root is None:
        return _read_remote(*find(str(source)), watch)
    folder = LocalFolder(root)
    if root != path:
        there = gguf_files.names_there(folder, path.name)
        if path.name not in freed and path.name not in there:
            raise SourceNotFoundError(f"{path}: no such file; give a GGUF file, or the folder of a checkpoint")
        return _read_gguf(folder, path.name, gguf_files.read_folder(folder, there, freed), freed)
    require_folder(root, "give the folder that holds the checkpoint's shards, or a GGUF file")
    if (root / MANIFEST_NAME).exists():
        raise ManifestError(f"{root}: has a {MANIFEST_NAME}, so it is already resharded; `reshard restore` undoes it")
    check_finished(root)
    names = find_gguf(root)
    if names or any(name.endswith(gguf_files.SUFFIX) for name in freed):
        return _read_gguf(folder, None, gguf_files.read_folder(folder, names, freed), freed)
    shards = read_shards(root, freed)
    return _read_beside(folder, shards, folder.read(INDEX_NAME, max_bytes=MAX_INDEX_BYTES))


def _read_remote(folder: RemoteFolder, name: str | None, watch: Watch | None) -> SourceCheckpoint:
    if name is not None:
        if not name.endswith(gguf_files.SUFFIX):
            raise SourceNotFoundError(
                f"{folder.where(name)}: is not a checkpoint; give the address of the folder that holds the shards"
            )
        return _read_gguf(folder, name, gguf_files.read_set(folder, name, watch), {})
    if is_resharded(folder):
        raise ManifestError(
            f"{folder}: has a {MANIFEST_NAME}, so it is already resharded; `runner -m` runs it from there, and any "
            "downloader copies its files"
        )
    if names := find_remote_gguf(folder):
        return _read_gguf(folder, None, gguf_files.read_folder(folder, names, watch=watch), {})
    index = read_index(folder)
    return _read_beside(folder, read_indexed(folder, index, watch), index)


def _read_beside(folder: Folder, shards: Mapping[str, Header], index: bytes | None) -> SourceCheckpoint:
    """Shards with what lies beside them, wherever that is."""
    auxiliary, left_out = list_small(folder, shards)
    return SourceCheckpoint(
        place=place_of(folder),
        shards=shards,
        index=index,
        config=read_config(folder),
        auxiliary=auxiliary,
        left_out=left_out,
    )


def _read_gguf(
    folder: Folder, named: str | None, model: gguf_files.GgufModel, freed: Mapping[str, Header]
) -> SourceCheckpoint:
    shards = {
        name: freed.get(name) or gguf_files.with_gaps(folder, name, header) for name, header in model.shards.items()
    }
    auxiliary: tuple[AuxiliaryFile, ...] = ()
    left_out: list[str] = []
    if named is None:
        found, others = list_small(folder, shards)
        # It may be another form's: of the FP8 files that this model was quantised from.
        auxiliary = tuple(file for file in found if file.path != CONFIG_NAME)
        left_out += others
        left_out += [f"{file.path} (the GGUF file says it itself)" for file in found if file not in auxiliary]
    own = {file.path for file in auxiliary}
    config, generated = _inside(
        model,
        next(iter(shards.values())),
        left_out,
        is_alone=named is not None,
        has_tokenizer=gguf_tokenizer.TOKENIZER_NAME in own,
    )
    return SourceCheckpoint(
        place=place_of(folder),
        file=named,
        kind="gguf",
        shards=shards,
        index=None,
        config=config,
        auxiliary=auxiliary,
        generated={name: content for name, content in generated.items() if name not in own},
        left_out=tuple(sorted(left_out)),
    )


def _inside(
    model: gguf_files.GgufModel, first: Header, left_out: list[str], *, is_alone: bool, has_tokenizer: bool
) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """The config that a GGUF model has inside, and it and the tokenizer as files; notes what cannot be had."""
    config: Mapping[str, Any] = {}
    generated: dict[str, bytes] = {}
    try:
        config = model.config()
    except UnsupportedModelError as error:
        left_out.append(f"{CONFIG_NAME} ({error})")
    try:
        generated = gguf_headers.tokenizer_of(first)
    except (ManifestError, UnsupportedModelError) as error:
        # The tensors are worth having without it, and one can be put beside them; of a file that was named nothing
        # beside it is taken.
        more = ", and name their folder" if is_alone and isinstance(error, UnsupportedModelError) else ""
        if not has_tokenizer:
            left_out.append(f"the tokenizer ({error}{more})")
    if config:
        generated[CONFIG_NAME] = config_document(config)
    return config, generated
