"""The format of resharded checkpoints, and the tools that read, validate, inspect and compare them.

The ground floor of the project: the standard library only (click in `cli` and `console` alone), no torch.

    >>> import manifests
    >>> checkpoint = manifests.open("DeepSeek-V3-experts")
    >>> views = checkpoint.expert(3, 17)
    >>> views["gate_proj.weight"].shape
    (2048, 7168)
"""

from manifests.checkpoint import Checkpoint, Location, TensorView
from manifests.errors import (
    IncompleteError,
    IntegrityError,
    LockedError,
    ManifestError,
    Problem,
    RemoteError,
    ResourceError,
    SourceNotFoundError,
    ToolkitError,
    UnsupportedModelError,
)
from manifests.inventory import open
from manifests.schema import FORMAT_VERSION, FileEntry, Manifest, TensorEntry
from manifests.storage import load, save

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "FileEntry",
    "IncompleteError",
    "IntegrityError",
    "Location",
    "LockedError",
    "Manifest",
    "ManifestError",
    "Problem",
    "RemoteError",
    "ResourceError",
    "SourceNotFoundError",
    "TensorEntry",
    "TensorView",
    "ToolkitError",
    "UnsupportedModelError",
    "load",
    "open",
    "save",
]
