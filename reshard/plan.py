"""What a reshard will do, complete before a byte moves: output files, where each tensor goes, what it needs.

Pure: a plan follows from the source's headers and the selection alone. The mover decides nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from manifests.errors import ManifestError, ToolkitError
from manifests.header import Header, HeaderTensor, encode_header
from manifests.names import Role, TensorName, find_missing_scales, parse_name
from manifests.paths import Kind, Place, Widths, format_path, place_of
from manifests.schema import Selection
from reshard.source import SourceCheckpoint


class SelectionError(ToolkitError):
    """A layer or expert was asked for that the checkpoint does not have: wrong arguments, not a wrong checkpoint."""

    exit_code = 2


PAGE_BYTES = 4096
"""Payloads start at a multiple of this, so that weights of whole pages can be mapped where they lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor's way: from an absolute offset in a source shard to an absolute offset in an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    shard: str
    source_offset: int
    output_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One output file: where it stands, the bytes of its header, its tensors in file order, its size."""

    path: str
    place: Place
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    size: int


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


def make_plan(source: SourceCheckpoint, selection: Selection) -> Plan:
    """Decide where every tensor goes.

    Raises:
        ManifestError: An FP8 weight has no scales.
        SelectionError: The selection names a layer or expert that is not there.
    """
    named = [
        (parse_name(tensor.name), shard, tensor, len(header.raw) + tensor.begin)
        for shard, header in source.shards.items()
        for tensor in header.tensors
    ]
    names = [name for name, *_ in named]
    _check_scales(source.shards)
    _check_selection(names, selection)
    widths = Widths.for_numbers(
        max((name.layer for name in names if name.layer is not None), default=0),
        max((name.expert for name in names if name.expert is not None), default=0),
    )
    groups: dict[Place, list[tuple[TensorName, str, HeaderTensor, int]]] = {}
    taken_by_shard = dict.fromkeys(source.shards, 0)
    for item in named:
        place = place_of(item[0])
        if selection.includes(place.layer, place.expert):
            groups.setdefault(place, []).append(item)
            taken_by_shard[item[1]] += 1
    files = [_plan_file(format_path(place, widths), place, items) for place, items in groups.items()]
    files.sort(key=lambda file: file.path)
    return Plan(
        files=tuple(files),
        selection=selection,
        complete_shards=frozenset(
            shard for shard, header in source.shards.items() if taken_by_shard[shard] == len(header.tensors)
        ),
        unknown={
            tensor.name: file.path
            for file in files
            if file.place.kind is Kind.DENSE
            for tensor in file.tensors
            if parse_name(tensor.name).role is Role.UNKNOWN
        },
        left_out_tensors=len(named) - sum(taken_by_shard.values()),
    )


def _plan_file(path: str, place: Place, items: list[tuple[TensorName, str, HeaderTensor, int]]) -> PlannedFile:
    # Weights first, in source order, then scales: V3's three expert matrices are whole pages long, so each of them
    # starts on a page boundary, and the small scales do not shift them.
    ordered = sorted(items, key=lambda item: item[0].is_scale)
    entries = []
    position = 0
    for _, _, tensor, _ in ordered:
        size = tensor.end - tensor.begin
        entries.append(
            HeaderTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, begin=position, end=position + size)
        )
        position += size
    header = encode_header(entries, align=PAGE_BYTES)
    tensors = tuple(
        PlannedTensor(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            size=entry.end - entry.begin,
            shard=shard,
            source_offset=source_offset,
            output_offset=len(header) + entry.begin,
        )
        for entry, (_, shard, _, source_offset) in zip(entries, ordered, strict=True)
    )
    return PlannedFile(path=path, place=place, header=header, tensors=tensors, size=len(header) + position)


def _check_scales(shards: Mapping[str, Header]) -> None:
    missing = find_missing_scales(
        (tensor.name, tensor.dtype) for header in shards.values() for tensor in header.tensors
    )
    if missing:
        raise ManifestError(
            f"FP8 weight {missing[0]!r} ({len(missing)} in all) has no weight_scale_inv in any shard; "
            "without its scales it has no value, download the checkpoint again"
        )


def _check_selection(names: list[TensorName], selection: Selection) -> None:
    for what, chosen, present in (
        ("layer", selection.layers, {name.layer for name in names}),
        ("expert", selection.experts, {name.expert for name in names}),
    ):
        absent = [number for number in chosen or () if number not in present]
        if absent:
            raise SelectionError(
                f"--{what}s: the checkpoint has no {what} {absent[0]}; `manifests show` tells what it has"
            )
