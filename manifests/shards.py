"""The original shards of a checkpoint: their headers, their index and their order.

They are asked of a folder, so it does not matter where they lie; no tensor is read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing

from manifests.errors import ManifestError, Problem
from manifests.folder import Folder
from manifests.header import Header, header_of
from manifests.jsontext import parse_json
from manifests.questions import Watch, each
from manifests.safety import check_relative

SUFFIX = ".safetensors"
MAX_INDEX_BYTES = 100_000_000

FIRST_BYTES = 96 << 10
"""Asked of a server at first: DeepSeek-V3's headers, of about 600 tensors each, are shorter, so one request is all."""


def read_headers(folder: Folder, names: Sequence[str], watch: Watch | None = None) -> dict[str, Header]:
    """The headers of these files, in the order of the names.

    Raises:
        See `read_header`.
    """
    found: dict[str, Header] = {}
    with closing(each(lambda name: read_header(folder, name), names, at_once=folder.at_once)) as headers:
        for name, header in zip(names, headers, strict=True):
            found[name] = header
            if watch is not None:
                watch(len(found), len(names))
    return found


def read_header(folder: Folder, name: str) -> Header:
    """The header of one file, of which no more than that is read.

    Raises:
        SourceNotFoundError: There is no such file.
        ManifestError: The header or the file's size is not what the format allows.
        IntegrityError: It changed while it was read.
        RemoteError: Its server cannot be reached, or does not do what is asked.
    """
    with folder.open(name, first=FIRST_BYTES) as file:
        return header_of(file)


def parse_weight_map(raw: bytes, *, what: str) -> dict[str, str]:
    """Tensor names to shards, from the bytes of an index.

    Raises:
        ManifestError: It has none, or names what is no shard below the folder.
    """
    index = parse_json(raw, what=what)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ManifestError(f"{what}: has no weight_map of tensor names to shards")
    for shard in set(map(str, weight_map.values())):
        check_relative(shard, what=what)
        if not shard.endswith(SUFFIX):
            raise ManifestError(f"{what}: {shard!r:.200} in weight_map is not a {SUFFIX} file")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ManifestError(f"{what}: weight_map must map names to file names")
    return weight_map


def source_order(names: Iterable[str]) -> list[str]:
    """The numeric order of names: Kimi-K2's ``model-2-of-61`` stands before ``model-10-of-61``."""
    return sorted(set(names), key=_numeric_order)


def check_index(where: str, weight_map: Mapping[str, str], shards: Mapping[str, Header]) -> None:
    """Refuse an index that does not say what the headers of its shards say.

    Raises:
        ManifestError: With every contradiction.
    """
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
            f"{where}: {problems[0]}{more}; index and shards are not of one checkpoint",
            [Problem(loc="weight_map", kind="inconsistent", message=problem) for problem in problems],
        )


def _numeric_order(name: str) -> tuple[list[tuple[int, str]], str]:
    # Every second part is digits. The name itself decides between model-1 and model-01, which are equal as numbers.
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)], name
