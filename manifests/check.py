"""Whether the files of a resharded checkpoint are there and have the form that the manifest says.

Sizes and headers are looked at, payloads are not: that takes seconds where `reshard verify` reads every byte.
"""

import os

from manifests.checkpoint import Checkpoint
from manifests.digest import sha256_hex
from manifests.errors import Problem, ToolkitError
from manifests.safety import resolve_inside
from manifests.schema import FileEntry


def check_files(checkpoint: Checkpoint) -> list[Problem]:
    """All problems of the files that the manifest names; empty when they are as described."""
    problems = []
    for file in checkpoint.manifest.files:
        problems += _check_one(checkpoint, file.path, file.size) or _check_header(checkpoint, file)
    for document in checkpoint.manifest.documents:
        problems += _check_one(checkpoint, document.path, document.size)
    return problems


def _check_one(checkpoint: Checkpoint, path: str, size: int) -> list[Problem]:
    try:
        found = os.stat(resolve_inside(checkpoint.root, path)).st_size
    except ToolkitError as error:
        return [Problem(loc=path, kind="missing_file", message=str(error).removeprefix(f"{checkpoint.root / path}: "))]
    if found != size:
        return [Problem(loc=path, kind="invalid_file", message=f"has {found} bytes, the manifest says {size}")]
    return []


def _check_header(checkpoint: Checkpoint, file: FileEntry) -> list[Problem]:
    # The header's bytes are compared by digest: a header of other form, order or padding is another header.
    if file.header_sha256 is None or file.codec != "none":
        return []
    with resolve_inside(checkpoint.root, file.path).open("rb") as opened:
        raw = opened.read(file.header_size)
    if sha256_hex(raw) != file.header_sha256:
        return [Problem(loc=file.path, kind="invalid_file", message="its header is not the one the manifest describes")]
    return []
