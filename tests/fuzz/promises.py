"""What must hold for everything that the parsers accept, and for every refusal.

A second reading of FORMAT.md and of the docstrings: an `AssertionError` says that something wrong was accepted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import safetensors
from gguf import GGMLQuantizationType, GGUFReader
from gguf.constants import GGML_QUANT_SIZES

from manifests.errors import ToolkitError
from manifests.gguf import GgufHeader
from manifests.header import Header, encode_header, parse_header
from manifests.names import parse_name
from manifests.paths import parse_path, place_of
from manifests.schema import Manifest, Selection
from manifests.summary import summarize
from reshard.plan import Plan, make_plan
from reshard.source import SourceCheckpoint

MAX_MESSAGE_CHARS = 12_000
"""A sentence with a name of 1,024 characters, each of them escaped."""

SMALL = 100_000


@contextlib.contextmanager
def accepted() -> Iterator[None]:
    """From here on the input counts as accepted: a refusal that comes after that is a finding."""
    try:
        yield
    except ToolkitError as error:
        raise AssertionError(f"accepted, and then refused: {error}") from error


def check_safe(path: str) -> None:
    """A path that was accepted stays below its folder on every system, and names what it seems to name."""
    assert path.isprintable()
    assert str(PurePosixPath(path)) == path
    assert os.path.normpath(f"/folder/{path}") == f"/folder/{path}"
    for kind in (PurePosixPath, PureWindowsPath):
        assert not kind(path).anchor
        assert ".." not in kind(path).parts
        assert len(kind(path).parts) == path.count("/") + 1


def check_header(header: Header, given: bytes) -> None:
    """An accepted header: its ranges cover the payload once, and the stock library accepts it too."""
    # A file may go on with zeros where the input ends.
    assert header.raw.startswith(given[: len(header.raw)])
    assert len(header.raw) == 8 + int.from_bytes(header.raw[:8], "little"), "shorter than its length field says"
    position = 0
    for tensor in header.tensors:
        assert tensor.begin == position, "a hole or an overlap"
        assert 0 < len(tensor.name) <= 1024
        tensor.name.encode("utf-8")
        position = tensor.end
    assert len(header.raw) + position == header.file_bytes
    assert len({tensor.name for tensor in header.tensors}) == len(header.tensors)
    again = encode_header(header.tensors, metadata=header.metadata, align=64)
    size = len(again) + position
    read = parse_header(again, file_bytes=size, what="x")
    assert sorted(t.name for t in read.tensors) == sorted(t.name for t in header.tensors)
    assert read.metadata == header.metadata
    if header.file_bytes < SMALL:
        found = dict(safetensors.deserialize(header.raw + bytes(position)))
        assert {name: (info["dtype"], tuple(info["shape"])) for name, info in found.items()} == {
            tensor.name: (tensor.dtype, tensor.shape) for tensor in header.tensors
        }


def check_gguf(header: GgufHeader, given: bytes) -> None:
    """An accepted GGUF header: tensors one behind the other, whole blocks, and padding alone between them."""
    # A file may go on with zeros where the input ends.
    assert header.raw.startswith(given[: len(header.raw)])
    assert not any(header.raw[len(given) :])
    assert len({tensor.name for tensor in header.tensors}) == len(header.tensors)
    end = len(header.raw)
    for tensor in header.tensors:
        elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type.name]]
        assert 0 < len(tensor.name) <= 1024
        assert len(tensor.shape) <= 4
        assert 0 <= tensor.begin - end < header.alignment, "a hole or an overlap"
        assert (tensor.begin - len(header.raw)) % header.alignment == 0
        assert (*tensor.shape, 1)[len(tensor.shape) - 1 if tensor.shape else 0] % elements == 0, "half a block"
        assert (tensor.end - tensor.begin) * elements == prod(tensor.shape) * size > 0
        end = tensor.end
    assert 0 <= header.file_bytes - end < header.alignment, "bytes that belong to nothing"
    assert all(type(value) in (int, float, bool, str, tuple) for value in header.metadata.values())


def check_gguf_again(header: GgufHeader, path: Path) -> None:
    """The ggml project's own reader finds the same in the file."""
    if any(not tensor.shape for tensor in header.tensors):
        return  # it ends with an IndexError at a scalar that is not one of numpy's own types
    reader = GGUFReader(path)
    found = [(tensor.name, tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors]
    assert sorted(found) == sorted((tensor.name, tensor.begin, tensor.end - tensor.begin) for tensor in header.tensors)
    # Its own fields have names that a file may have as well.
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == {
        key for key in header.metadata if not key.startswith("GGUF.")
    }


def check_folder(paths: list[str]) -> None:
    """Files that can stand in one folder beside what the tools keep there, also where case is ignored."""
    names = {path.casefold() for path in paths}
    assert len(names) == len(paths), "two files in one place"
    assert not names & {str(above) for name in names for above in PurePosixPath(name).parents}, "a file in a file"
    assert not names & {"manifest.json", "manifest.json.aside", "reshard-journal.jsonl"}, "a name of the tools"
    assert not any(path.endswith(".partial") for path in paths), "a name of an unfinished file"


def check_manifest(manifest: Manifest) -> None:
    """An accepted manifest: safe and unique paths, unique names, ranges in their files, and numbers fit to print."""
    paths = [file.path for file in manifest.files] + [document.path for document in manifest.documents]
    shards = manifest.source.shards if manifest.source else ()
    sources = [document.source_name for document in manifest.documents if document.source_name is not None]
    for path in [*paths, *sources, *(shard.name for shard in shards), *(shard.header for shard in shards)]:
        check_safe(path)
    check_folder(paths)
    check_folder(
        [
            *(d.source_name for d in manifest.documents if d.source_name and d.role != "source_header"),
            *(shard.name for shard in shards),
        ]
    )
    names = [tensor.name for file in manifest.files for tensor in file.tensors]
    assert len(set(names)) == len(names)
    for file in manifest.files:
        position = file.header_size
        for tensor in file.tensors:
            assert tensor.offset >= position, "an overlap"
            assert tensor.offset == position or manifest.layout != "resharded", "a hole"
            assert prod(number for number in tensor.shape if number) <= 2**62, "more elements than a file can hold"
            position = tensor.offset + tensor.size
        assert position <= file.unpacked_size
        if manifest.layout == "resharded":
            assert position == file.unpacked_size
            place = parse_path(file.path.removesuffix(".zst"))
            assert place is not None
            assert (place.layer, place.kind, place.expert) == (file.layer, file.kind, file.expert)
    json.dumps(dataclasses.asdict(summarize(manifest)))


def check_plan(source: SourceCheckpoint, plan: Plan) -> None:
    """A plan of everything: every byte of every payload goes to one place, and the files are what they should be."""
    for number, file in enumerate(plan.files):
        check_safe(file.path)
        assert parse_path(file.path) == file.place
        assert len(file.header) == file.header_size
        assert file.header_size % 4096 == 0
        header = parse_header(file.header, file_bytes=file.size, what="x")
        assert {(t.name, t.dtype, t.shape) for t in header.tensors} == {
            (t.name, t.dtype, t.shape) for t in file.tensors
        }
        position = file.header_size
        for tensor in file.tensors:
            assert place_of(parse_name(tensor.name)) == file.place
            assert tensor.file == number
            assert tensor.output_offset == position
            position += tensor.size
        assert position == file.size
    assert len({file.path.casefold() for file in plan.files}) == len(plan.files)
    ways = plan.by_shard()
    for shard, header in source.shards.items():
        position = len(header.raw)
        for tensor in ways.pop(shard, []):
            assert tensor.source_offset == position, "a byte of the source goes nowhere, or to two places"
            position += tensor.size
        assert position == header.file_bytes
    assert not ways
    planned = [tensor.name for file in plan.files for tensor in file.tensors]
    assert sorted(planned) == sorted(tensor.name for header in source.shards.values() for tensor in header.tensors)
    assert plan.complete_shards == source.shards.keys()
    assert plan.left_out_tensors == 0


def check_part(source: SourceCheckpoint, plan: Plan, selection: Selection) -> None:
    """A plan of a part is a part of the plan: the same files, but for their numbers."""
    part = make_plan(source, selection)
    whole = {file.path: file for file in plan.files}
    for file in part.files:
        same = whole[file.path]
        assert (file.place, file.header, file.size) == (same.place, same.header, same.size)
        assert [(t.shard, t.source_offset) for t in file.tensors] == [(t.shard, t.source_offset) for t in same.tensors]
    taken = sum(len(file.tensors) for file in part.files)
    assert taken + part.left_out_tensors == sum(len(file.tensors) for file in plan.files)


def without_defaults(document: Any) -> Any:
    """A manifest's document without its digest and without values that are said although they need not be."""
    del document["manifest_sha256"]
    for entry in [*document["files"], *document["documents"]]:
        if entry.get("codec") == "none":
            del entry["codec"]
        for tensor in entry.get("tensors", ()):
            for key, default in (
                ("encoding", "plain"),
                ("logical_shape", tensor["shape"]),
                ("source_name", tensor["name"]),
            ):
                if tensor.get(key) == default:
                    del tensor[key]
    return document


def check_error(error: ToolkitError) -> None:
    """A refusal is a sentence that any terminal and any log takes."""
    for text in (str(error), *(f"{problem.loc} {problem.message}" for problem in getattr(error, "problems", ()))):
        assert text.strip(), "an empty message"
        assert len(text) <= MAX_MESSAGE_CHARS, f"a message of {len(text)} characters"
        text.encode("utf-8")
