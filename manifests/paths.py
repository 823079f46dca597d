"""The one rule from (layer, kind, expert) to a relative path, and back; and which file a tensor goes to.

Paths are formatted from integers. No text from a checkpoint ever becomes part of one.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from manifests.names import Role, TensorName

MANIFEST_NAME = "manifest.json"
ASIDE_NAME = "manifest.json.aside"
"""The manifest of a folder that is being changed: its files are no longer all as it says."""
JOURNAL_NAME = "reshard-journal.jsonl"
"""In a folder that is being written: what is durable so far. Removed when the folder is complete."""
TEMP_SUFFIX = ".partial"
"""Of a file that is being written."""
INDEX_NAME = "model.safetensors.index.json"
SOURCE_FOLDER = "source"
OWN_FOLDERS = ("layers", "model", SOURCE_FOLDER)
"""Top-level folders that a resharded checkpoint fills itself; auxiliary files must stay out of them."""


class Kind(StrEnum):
    """What a file holds. ``shard`` is a source shard described in place, of whatever content."""

    EMBED = "embed"
    HEAD = "head"
    DENSE = "dense"
    EXPERT = "expert"
    SHARD = "shard"


@dataclass(frozen=True, slots=True)
class Place:
    """The identity of an output file: layer (None for the model's own files), kind, expert."""

    layer: int | None
    kind: Kind
    expert: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Digits of layer and expert numbers in paths: as many as the model's largest number needs."""

    layer: int
    expert: int

    @classmethod
    def for_numbers(cls, max_layer: int, max_expert: int) -> "Widths":
        """Widths for a model whose largest layer and expert numbers are these."""
        return cls(layer=len(str(max_layer)), expert=len(str(max_expert)))


_KIND_OF_ROLE = {
    Role.EMBEDDING: Kind.EMBED,
    Role.FINAL_NORM: Kind.HEAD,
    Role.LM_HEAD: Kind.HEAD,
    # The MTP layer's copies of embedding and head have their own files, so that nobody reads them twice.
    Role.MTP_EMBEDDING: Kind.EMBED,
    Role.MTP_HEAD: Kind.HEAD,
    Role.ROUTED_EXPERT: Kind.EXPERT,
}

_PATH = re.compile(
    r"model/(?P<model>embed|head|dense)\.safetensors"
    r"|layers/(?P<layer>[0-9]{1,4})/(?:(?P<kind>embed|head|dense)|experts/(?P<expert>[0-9]{1,4}))\.safetensors"
)


def place_of(name: TensorName) -> Place:
    """Where a tensor goes. An unknown name goes to its layer's dense file, or to the model's."""
    return Place(name.layer, _KIND_OF_ROLE.get(name.role, Kind.DENSE), name.expert)


def format_path(place: Place, widths: Widths) -> str:
    """The relative path of an output file, such as ``layers/03/experts/007.safetensors``."""
    if place.layer is None:
        return f"model/{place.kind}.safetensors"
    folder = f"layers/{place.layer:0{widths.layer}d}"
    if place.kind is Kind.EXPERT:
        return f"{folder}/experts/{place.expert:0{widths.expert}d}.safetensors"
    return f"{folder}/{place.kind}.safetensors"


def parse_path(path: str) -> Place | None:
    """The inverse of `format_path` for any widths; None when the path is not of this form."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    if match["model"]:
        return Place(None, Kind(match["model"]))
    if match["expert"]:
        return Place(int(match["layer"]), Kind.EXPERT, int(match["expert"]))
    return Place(int(match["layer"]), Kind(match["kind"]))
