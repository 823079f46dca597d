"""Pure summaries of a manifest: parameters, bytes by kind and dtype, the layers, and the difference of two.

Parameters are elements of weights. Block scales are not counted, and neither are buffers that are computed from
the config. The router's correction bias counts as a parameter of the model, but not as activated: it only selects.
Definitions: main = all layers below ``num_hidden_layers`` with embedding, head and final norm; MTP's own = the
layers from there on without their copies of embedding and head; activated = main without the routed experts that
a token does not select.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from manifests.names import Role, TensorName, parse_name
from manifests.schema import PLAIN, Manifest, TensorEntry

_COPIES = (Role.MTP_EMBEDDING, Role.MTP_HEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Parameter counts; see the module's definitions.

    Attributes:
        main: Parameters of the main model.
        mtp: The MTP layers' own.
        mtp_copies: Their copies of embedding and head.
        routed: Routed experts of the main model.
        activated: Used for one token, embedding and head counted whole; None for a part of a model, and when the
            config does not say how many experts a token selects.
    """

    main: int
    mtp: int
    mtp_copies: int
    routed: int
    activated: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One layer: its tensors and bytes, how many routed experts it has, and whether it is an MTP layer."""

    layer: int
    tensors: int
    bytes: int
    experts: int
    expert_bytes: int
    is_mtp: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What `manifests show` prints. Quantised tensors are counted under their block type in place of the dtype.

    `file_bytes` are those on disk. Files that are stored compressed are among them, and counted once more: how many
    they are, the bytes they take, and those they unpack to.
    """

    layout: str
    model_type: str | None
    files: int
    file_bytes: int
    packed_files: int
    packed_bytes: int
    unpacked_bytes: int
    tensors: int
    tensor_bytes: int
    parameters: Parameters
    bytes_by_role: Mapping[str, int]
    bytes_by_dtype: Mapping[str, int]
    tensors_by_dtype: Mapping[str, int]
    layers: tuple[LayerSummary, ...]
    unknown: tuple[str, ...]
    partial: bool


def summarize(manifest: Manifest) -> Summary:
    """Count everything in one pass over the tensors."""
    entries = [(parse_name(tensor.name), tensor) for file in manifest.files for tensor in file.tensors]
    packed = [file for file in manifest.files if file.codec != "none"]
    by_role: Counter[str] = Counter()
    by_dtype: Counter[str] = Counter()
    count_by_dtype: Counter[str] = Counter()
    for name, tensor in entries:
        by_role[name.role] += tensor.size
        dtype = tensor.dtype if tensor.encoding == PLAIN else tensor.encoding
        by_dtype[dtype] += tensor.size
        count_by_dtype[dtype] += 1
    return Summary(
        layout=manifest.layout,
        model_type=manifest.model.model_type,
        files=len(manifest.files),
        file_bytes=sum(file.size for file in manifest.files),
        packed_files=len(packed),
        packed_bytes=sum(file.size for file in packed),
        unpacked_bytes=sum(file.unpacked_size for file in packed),
        tensors=len(entries),
        tensor_bytes=sum(tensor.size for _, tensor in entries),
        parameters=_count_parameters(entries, manifest),
        bytes_by_role=dict(by_role.most_common()),
        bytes_by_dtype=dict(by_dtype.most_common()),
        tensors_by_dtype=dict(count_by_dtype.most_common()),
        layers=_layers(entries, manifest),
        unknown=tuple(name.text for name, _ in entries if name.role is Role.UNKNOWN),
        partial=not manifest.selection.is_everything,
    )


def _count_parameters(entries: list[tuple[TensorName, TensorEntry]], manifest: Manifest) -> Parameters:
    totals: Counter[str] = Counter()
    for name, tensor in entries:
        if name.is_scale or name.role is Role.BUFFER:
            continue
        elements = prod(tensor.logical_shape)
        if _is_mtp(name.layer, manifest):
            totals["mtp_copies" if name.role in _COPIES else "mtp"] += elements
            continue
        totals["main"] += elements
        if name.role is Role.ROUTED_EXPERT:
            totals["routed"] += elements
        elif name.part == "e_score_correction_bias":
            totals["selecting"] += elements
    return Parameters(
        main=totals["main"],
        mtp=totals["mtp"],
        mtp_copies=totals["mtp_copies"],
        routed=totals["routed"],
        activated=_count_activated(totals, manifest),
    )


def _count_activated(totals: Mapping[str, int], manifest: Manifest) -> int | None:
    facts = manifest.model
    # Of a part of a model, or of a file alone, nobody can say what a token uses.
    if facts.num_hidden_layers is None or not manifest.selection.is_everything:
        return None
    always = totals["main"] - totals["routed"] - totals["selecting"]
    if not totals["routed"]:
        return always
    if not facts.n_routed_experts or facts.num_experts_per_tok is None:
        return None
    return always + totals["routed"] * facts.num_experts_per_tok // facts.n_routed_experts


def _is_mtp(layer: int | None, manifest: Manifest) -> bool:
    layers = manifest.model.num_hidden_layers
    return layer is not None and layers is not None and layer >= layers


def _layers(entries: list[tuple[TensorName, TensorEntry]], manifest: Manifest) -> tuple[LayerSummary, ...]:
    tensors: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    expert_sizes: Counter[int] = Counter()
    experts: dict[int, set[int]] = {}
    for name, tensor in entries:
        if name.layer is None:
            continue
        tensors[name.layer] += 1
        sizes[name.layer] += tensor.size
        if name.expert is not None:
            experts.setdefault(name.layer, set()).add(name.expert)
            expert_sizes[name.layer] += tensor.size
    return tuple(
        LayerSummary(
            layer=layer,
            tensors=tensors[layer],
            bytes=sizes[layer],
            experts=len(experts.get(layer, ())),
            expert_bytes=expert_sizes[layer],
            is_mtp=_is_mtp(layer, manifest),
        )
        for layer in sorted(tensors)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One difference of two checkpoints.

    Attributes:
        kind: ``only_in_a``, ``only_in_b``, ``dtype``, ``shape``, ``encoding``, ``digest``, or ``undecided`` (alike
            in form, but one side has no digests).
        what: ``tensor`` or ``document``.
        name: Tensor name or document path.
        a, b: The differing values, None where there is none.
    """

    kind: str
    what: str
    name: str
    a: Any = None
    b: Any = None


def diff(a: Manifest, b: Manifest) -> list[Difference]:
    """Compare two manifests by content: tensors by name, documents by path; where the bytes lie does not matter.

    Documents are compared between resharded checkpoints only: original files in place are described by their tensors.
    """
    differences = _diff_by_key("tensor", _tensors_of(a), _tensors_of(b))
    if a.layout == b.layout == "resharded":
        differences += _diff_by_key("document", _documents_of(a), _documents_of(b))
    return differences


def _tensors_of(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {
        tensor.name: {
            "dtype": tensor.dtype,
            # Before the shape, which is in bytes where it is not plain.
            "encoding": tensor.encoding,
            "shape": list(tensor.shape),
            "digest": tensor.digest,
        }
        for file in manifest.files
        for tensor in file.tensors
    }


def _documents_of(manifest: Manifest) -> dict[str, dict[str, Any]]:
    # Our own index follows from the tensors, and source headers from the source: what people wrote is compared, in
    # files or in the metadata of a GGUF file.
    return {
        document.path: {"digest": document.sha256}
        for document in manifest.documents
        if document.role in ("auxiliary", "generated")
    }


def _diff_by_key(what: str, a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> list[Difference]:
    found = [Difference(kind="only_in_a", what=what, name=name) for name in a if name not in b]
    found += [Difference(kind="only_in_b", what=what, name=name) for name in b if name not in a]
    for name in a.keys() & b.keys():
        for key, left in a[name].items():
            right = b[name][key]
            if left == right:
                if left is None:
                    found.append(Difference(kind="undecided", what=what, name=name))
                continue
            kind = "undecided" if left is None or right is None else key
            found.append(Difference(kind=kind, what=what, name=name, a=left, b=right))
            break
    return sorted(found, key=lambda difference: (difference.what, difference.name))
