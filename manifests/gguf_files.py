"""GGUF files as a checkpoint in place: which files belong together, and every tensor where it lies.

A model is one file, or a split set ``NAME-00001-of-00003.gguf`` whose first file has the metadata. They are asked of a
folder, so it does not matter where they lie. This file knows sets of headers; it reads no tensor.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from manifests.auxiliary import Auxiliary
from manifests.checkpoint import Checkpoint
from manifests.config import model_facts
from manifests.errors import ManifestError, SourceNotFoundError, UnsupportedModelError
from manifests.folder import Folder
from manifests.gguf import READ_BYTES, GgufHeader, gguf_of, parse_gguf
from manifests.gguf_config import ARCHITECTURE_KEY, hugging_face_config
from manifests.gguf_headers import gaps, translated
from manifests.gguf_tokenizer import NAMES as TOKENIZER_NAMES
from manifests.gguf_tokenizer import tokenizer_documents
from manifests.header import Gap, Header
from manifests.in_place import describe_in_place
from manifests.questions import Watch, each

SUFFIX = ".gguf"

_MERGED = 0
"""What llama.cpp writes for the count of files into the one that it makes of a set."""

_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """What is known of a model without reading its tensors.

    Attributes:
        shards: Each file as a header under Hugging Face's names, in the order of the set; its gaps were not read.
        architecture: What the metadata calls it; None where it does not, or for one file of a set.
        config: Gives its config.json, which may be refused; see `manifests.gguf_config`. Empty for one file of a set.
        auxiliary: Gives the files of its tokenizer by name, each of which may be refused or None; see
            `manifests.gguf_tokenizer`. None of them for one file of a set.
    """

    shards: Mapping[str, Header]
    architecture: str | None
    config: Callable[[], Mapping[str, Any]]
    auxiliary: Mapping[str, Callable[[], bytes | None]]


def open_gguf(folder: Folder, model: GgufModel) -> Checkpoint:
    """A model in this folder as a checkpoint."""
    try:
        facts = model_facts(model.config() or {"model_type": model.architecture})
    except (ManifestError, UnsupportedModelError):
        # Said to whoever asks for the config; what tensors there are can be told without it.
        facts = model_facts({"model_type": model.architecture})
    auxiliary = Auxiliary(folder, model.auxiliary, derived_from=len(next(iter(model.shards.values())).raw))
    return Checkpoint(folder, describe_in_place(model.shards, facts), model.config, auxiliary)


def read_file(folder: Folder, name: str) -> GgufModel:
    """One file: a whole model, or one of a split set, of which nobody can say what the model is.

    Raises:
        SourceNotFoundError: There is no such file.
        ManifestError: It is not what the format allows.
        RemoteError: Its server cannot be reached, or does not do what is asked.
    """
    header = _read(folder, name)
    return _describe(folder, {name: header}, what=folder.where(name), is_whole=_is_whole(header))


def set_names(name: str) -> list[str]:
    """Names of all files of the model that has one of this name, in order: itself, or those of its split set."""
    match = _PART.fullmatch(name)
    if match is None or not int(match[3]):
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}{SUFFIX}" for number in range(1, int(match[3]) + 1)]


def read_set(folder: Folder, name: str, watch: Watch | None = None) -> GgufModel:
    """The model that one file belongs to: itself, or its whole split set, which lies beside it.

    Raises:
        SourceNotFoundError: There is no such file, or others of the set are missing.
        ManifestError: See `read_folder`; or it is of a set, and has not the name of such a file.
        RemoteError: See `read_file`.
    """
    header = _read(folder, name)
    if _is_whole(header):
        return _describe(folder, {name: header}, what=folder.where(name), is_whole=True)
    if set_names(name) == [name]:
        raise ManifestError(
            f"{folder.where(name)}: is one file of a split model, and its name does not say which the others are; "
            "give all of them their own names again, such as NAME-00001-of-00003.gguf"
        )
    return _read_parts(folder, names_there(folder, name), {name: header}, watch)


def read_set_or_file(folder: Folder, name: str) -> GgufModel:
    """As `read_set` where all files of a set are there; one of them alone is worth having, too.

    Raises:
        SourceNotFoundError, ManifestError, RemoteError: See `read_file` and `read_folder`.
    """
    names = set_names(name)
    if len(names) > 1 and names_there(folder, name) == names:
        return read_folder(folder, names)
    return read_file(folder, name)


def names_there(folder: Folder, name: str) -> list[str]:
    """Names of the files that belong to one of this name and are there, in order.

    Raises:
        RemoteError: Their server cannot be reached.
    """
    names = set_names(name)
    with closing(each(folder.size, names, at_once=folder.at_once)) as sizes:
        return [name for name, size in zip(names, sizes, strict=True) if size is not None]


def read_folder(
    folder: Folder,
    names: Sequence[str],
    absent: Mapping[str, Header] | None = None,
    watch: Watch | None = None,
) -> GgufModel:
    """The model whose files these are: one file, or a whole split set.

    Args:
        folder: Where they are.
        names: Those of its GGUF files, one or more.
        absent: Headers of files that need not be there any more.
        watch: Is told how far the headers are.

    Raises:
        SourceNotFoundError: Files of the set are missing, or these are files of several models.
        ManifestError: A file is not what the format allows, or the files are not of one set.
        RemoteError: See `read_file`.
    """
    known = {
        name: parse_gguf(header.raw, file_bytes=header.file_bytes, what=f"saved header of {name}")
        for name, header in (absent or {}).items()
    }
    return _read_parts(folder, names, known, watch)


def _read_parts(
    folder: Folder, names: Sequence[str], known: Mapping[str, GgufHeader], watch: Watch | None
) -> GgufModel:
    """As `read_folder`, with headers that were read before."""
    parts = _order_parts(folder, sorted({*names, *known}))

    def read(name: str) -> GgufHeader:
        return known.get(name) or _read(folder, name)

    headers: dict[str, GgufHeader] = {}
    with closing(each(read, parts, at_once=folder.at_once)) as found:
        for name, header in zip(parts, found, strict=True):
            headers[name] = header
            if watch is not None:
                watch(len(headers), len(parts))
    tensors = sum(len(header.tensors) for header in headers.values())
    for number, (name, header) in enumerate(headers.items()):
        if len(parts) == 1:
            _require_whole(folder.where(name), header)
        facts = {"split.no": number, "split.count": len(parts), "split.tensors.count": tensors}
        for key, expected in facts.items():
            # A file that never was split has none of them.
            value = header.metadata.get(key, expected if len(parts) == 1 else None)
            if key == "split.count" and len(parts) == 1 and value == _MERGED:
                continue
            if type(value) is not int or value != expected:
                raise ManifestError(
                    f"{folder.where(name)}: has {key} {value!r:.40}, which must be {expected} for these files; they "
                    "are not one split set, download them again"
                )
    return _describe(folder, headers, what=str(folder), is_whole=True)


def with_gaps(folder: Folder, name: str, header: Header) -> Header:
    """The same header of a file with the bytes between its tensors, which are read for it.

    Raises:
        SourceNotFoundError, RemoteError: See `read_file`.
        ManifestError: The file became shorter.
    """

    def read(gap: tuple[int, int]) -> Gap:
        begin, size = gap
        content = file.read(len(header.raw) + begin, size)
        if len(content) < size:
            raise ManifestError(f"{file.what}: became shorter while it was read; download it again")
        return Gap(begin=begin, content=content)

    wanted = list(gaps(header))
    if not wanted:
        return header
    with folder.open(name, first=1) as file, closing(each(read, wanted, at_once=folder.at_once)) as found:
        return replace(header, gaps=tuple(found))


def _read(folder: Folder, name: str) -> GgufHeader:
    with folder.open(name, first=READ_BYTES) as file:
        return gguf_of(file)


def _is_whole(header: GgufHeader) -> bool:
    return header.metadata.get("split.count", 1) in (_MERGED, 1)


def _require_whole(where: str, header: GgufHeader) -> None:
    """Refuse a file of a set by another name, of which nobody can tell where the others are."""
    number, count = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)
    if type(number) is type(count) is int and number < count > 1:
        raise ManifestError(
            f"{where}: is file {number + 1} of {count} of a split model; give all of them the names that they had, "
            f"such as NAME-{number + 1:05d}-of-{count:05d}{SUFFIX}"
        )


def _order_parts(folder: Folder, names: Sequence[str]) -> list[str]:
    """The names of one model's files, in their order."""
    matches = [_PART.fullmatch(name) for name in names]
    sets = {(match[1], int(match[3])) for match in matches if match is not None}
    if None not in matches and len(sets) == 1:
        _, count = sets.pop()
        expected = set_names(names[0])
        present = set(names)
        missing = [name for name in expected if name not in present]
        if missing:
            raise SourceNotFoundError(
                f"{folder}: {len(missing)} of {count} files of a split model are missing, first {missing[0]}; download "
                "them, or give them back their names"
            )
        if len(present) == count:
            return expected
    elif len(names) == 1:
        return list(names)
    raise SourceNotFoundError(
        f"{folder}: {len(names)} {SUFFIX} files that are not one model; name one file, or keep one model in a folder"
    )


def _describe(folder: Folder, headers: Mapping[str, GgufHeader], *, what: str, is_whole: bool) -> GgufModel:
    first, header = next(iter(headers.items()))
    metadata = header.metadata
    architecture = metadata.get(ARCHITECTURE_KEY)
    shards = translated(headers, what)
    if not is_whole:
        return GgufModel(shards=shards, architecture=None, config=dict, auxiliary={})
    names = {tensor.name for header in headers.values() for tensor in header.tensors}
    config = partial(
        _read_config,
        folder.where(first),
        # Not the vocabulary, which would stay in memory for as long as the checkpoint is open.
        {
            key: value
            for key, value in metadata.items()
            if not (isinstance(value, tuple) and key.startswith("tokenizer."))
        },
        has_router_bias=any(name.endswith(".exp_probs_b.bias") for name in names),
        has_head="output.weight" in names,
    )
    return GgufModel(
        shards=shards,
        architecture=architecture if isinstance(architecture, str) else None,
        config=config,
        auxiliary={name: partial(_read_tokenizer, folder, first, name) for name in TOKENIZER_NAMES},
    )


def _read_config(where: str, metadata: Mapping[str, Any], **tensors: bool) -> Mapping[str, Any]:
    with _named(where):
        return hugging_face_config(metadata, **tensors)


def _read_tokenizer(folder: Folder, first: str, name: str) -> bytes | None:
    # The header is read again, so that the vocabulary is in memory only while it is asked for.
    metadata = _read(folder, first).metadata
    with _named(folder.where(first)):
        return tokenizer_documents(metadata).get(name)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say of what is refused which file has it."""
    try:
        yield
    except (ManifestError, UnsupportedModelError) as error:
        raise type(error)(f"{where}: {error}") from error
