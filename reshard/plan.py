"""What a reshard will do, complete before a byte moves: output files, where each tensor goes, what it needs.

Pure: a plan follows from the source's headers and the selection alone. The mover decides nothing.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeAlias

from manifests.errors import ManifestError, ToolkitError
from manifests.header import LENGTH_BYTES, MAX_HEADER_BYTES, Header, HeaderTensor, encode_header
from manifests.names import Role, find_missing_scales, parse_name
from manifests.paths import Place, Widths, format_path, place_of
from manifests.schema import Selection
from manifests.shared import Shared
from reshard.source import SourceCheckpoint


class SelectionError(ToolkitError):
    """A layer or expert was asked for that the checkpoint does not have: wrong arguments, not a wrong checkpoint."""

    exit_code = 2


PAGE_BYTES = 4096
"""Payloads start at a multiple of this, so that weights of whole pages can be mapped where they lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor's way: from an absolute offset in a source shard to an absolute offset in an output file.

    `file` is the number of the output file in `Plan.files`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    logical_shape: tuple[int, ...]
    source_name: str
    size: int
    shard: str
    source_offset: int
    file: int
    output_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One output file: where it stands, bytes of its header, its tensors in file order, bytes of all of it."""

    path: str
    place: Place
    header_size: int
    tensors: tuple[PlannedTensor, ...]
    size: int

    @property
    def header(self) -> bytes:
        """The header itself, made anew each time: kept, DeepSeek-V3's fifteen thousand would be 62 MB of padding."""
        return _encode(
            HeaderTensor(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                begin=tensor.output_offset - self.header_size,
                end=tensor.output_offset - self.header_size + tensor.size,
            )
            for tensor in self.tensors
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole reshard.

    Attributes:
        files: Output files, sorted by path.
        selection: What was asked for.
        complete_shards: Names of the shards whose every tensor is taken, so that their sha256 becomes known.
        unknown: Tensor names that no rule knows, and the file each goes to.
        left_out_tensors: How many tensors the selection leaves out.
    """

    files: tuple[PlannedFile, ...]
    selection: Selection
    complete_shards: frozenset[str]
    unknown: Mapping[str, str]
    left_out_tensors: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of tensors that will be read and written."""
        return sum(tensor.size for file in self.files for tensor in file.tensors)

    @property
    def output_bytes(self) -> int:
        """Bytes of the output files with their headers."""
        return sum(file.size for file in self.files)

    def by_shard(self) -> dict[str, list[PlannedTensor]]:
        """What is taken of each shard, in the order in which it lies there; a shard that gives nothing is absent."""
        taken: dict[str, list[PlannedTensor]] = {}
        for file in self.files:
            for tensor in file.tensors:
                taken.setdefault(tensor.shard, []).append(tensor)
        for tensors in taken.values():
            # An empty tensor lies where its neighbour begins, and comes before it.
            tensors.sort(key=lambda tensor: (tensor.source_offset, tensor.size))
        return taken


def make_plan(source: SourceCheckpoint, selection: Selection) -> Plan:
    """Decide where every tensor goes.

    Raises:
        ManifestError: An FP8 weight has no scales, or one file's tensors are more than a header can name.
        SelectionError: The selection names a layer or expert that is not there.
    """
    _check_scales(source.shards)
    groups: dict[Place, list[_Item]] = {}
    unknown: set[str] = set()
    for shard, header in source.shards.items():
        for tensor in header.tensors:
            name = parse_name(tensor.name)
            groups.setdefault(place_of(name), []).append((name.is_scale, shard, len(header.raw), tensor))
            if name.role is Role.UNKNOWN:
                unknown.add(tensor.name)
    _check_selection(groups, selection)
    widths = Widths.for_numbers(
        max((place.layer for place in groups if place.layer is not None), default=0),
        max((place.expert for place in groups if place.expert is not None), default=0),
    )
    taken = {format_path(place, widths): place for place in groups if selection.includes(place.layer, place.expert)}
    shared = Shared()
    # Popped: what one file needed while it was planned makes room for the next.
    files = tuple(
        _plan_file(number, path, taken[path], groups.pop(taken[path]), shared)
        for number, path in enumerate(sorted(taken))
    )
    left_out = [shard for items in groups.values() for _, shard, _, _ in items]
    return Plan(
        files=files,
        selection=selection,
        complete_shards=frozenset(source.shards).difference(left_out),
        unknown={tensor.name: file.path for file in files for tensor in file.tensors if tensor.name in unknown},
        left_out_tensors=len(left_out),
    )


_Item: TypeAlias = tuple[bool, str, int, HeaderTensor]
"""A tensor on its way into a file: whether it holds scales, its shard, where that one's payload begins, its entry."""


def _plan_file(number: int, path: str, place: Place, items: list[_Item], shared: Shared) -> PlannedFile:
    # Weights first, in source order, then scales: V3's three expert matrices are whole pages long, so each of them
    # starts on a page boundary, and the small scales do not shift them.
    items.sort(key=itemgetter(0))
    entries = []
    position = 0
    for _, _, _, tensor in items:
        size = tensor.end - tensor.begin
        entries.append(
            HeaderTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, begin=position, end=position + size)
        )
        position += size
    header_size = len(_encode(entries))
    if header_size > LENGTH_BYTES + MAX_HEADER_BYTES:
        raise ManifestError(
            f"{path} would hold {len(entries):,} tensors, and their header of {header_size:,} bytes is over the limit "
            f"of {MAX_HEADER_BYTES:,}"
        )
    tensors = tuple(
        PlannedTensor(
            name=entry.name,
            dtype=shared[entry.dtype],
            shape=shared[entry.shape],
            encoding=shared[tensor.encoding],
            logical_shape=shared[tensor.logical_shape or entry.shape],
            source_name=shared[tensor.source_name or entry.name],
            size=shared[entry.end - entry.begin],
            shard=shard,
            source_offset=payload + tensor.begin,
            file=number,
            output_offset=shared[header_size + entry.begin],
        )
        for entry, (_, shard, payload, tensor) in zip(entries, items, strict=True)
    )
    return PlannedFile(path=path, place=place, header_size=header_size, tensors=tensors, size=header_size + position)


def _encode(entries: Iterable[HeaderTensor]) -> bytes:
    return encode_header(list(entries), align=PAGE_BYTES)


def _check_scales(shards: Mapping[str, Header]) -> None:
    missing = find_missing_scales(
        (tensor.name, tensor.dtype) for header in shards.values() for tensor in header.tensors
    )
    if missing:
        raise ManifestError(
            f"FP8 weight {missing[0]!r} ({len(missing)} in all) has no weight_scale_inv in any shard; "
            "without its scales it has no value, download the checkpoint again"
        )


def _check_selection(places: Collection[Place], selection: Selection) -> None:
    for what, chosen, present in (
        ("layer", selection.layers, {place.layer for place in places}),
        ("expert", selection.experts, {place.expert for place in places}),
    ):
        absent = [number for number in chosen or () if number not in present]
        if absent:
            raise SelectionError(
                f"--{what}s: the checkpoint has no {what} {absent[0]}; `manifests show` tells what it has"
            )
