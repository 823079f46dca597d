"""Which relative paths may be followed below a folder. Everything that a file says about a path passes here."""

import os
from pathlib import Path, PureWindowsPath

from manifests.errors import ManifestError, SourceNotFoundError
from manifests.readable import refusal, require_regular


def check_relative(path: str, *, what: str) -> str:
    """Return path if it is a plain relative path with forward slashes that stays below its folder.

    Refused on every system alike, so that a file is as safe to move as to read: empty parts, ``.``, ``..``,
    absolute paths, drive letters, backslashes, colons, control characters.

    Raises:
        ManifestError: With what, the path and the reason.
    """
    reason = relative_fault(path)
    if reason:
        raise ManifestError(f"{what}: path {path!r:.200} {reason}; refused")
    return path


def relative_fault(path: str) -> str | None:
    """Why path is not a plain relative path, or None when it is."""
    if not path or len(path) > 1024:
        return "is empty or too long"
    if "\\" in path or ":" in path or not path.isprintable():
        return "has a backslash, a colon or a control character"
    windows = PureWindowsPath(path)
    if path.startswith("/") or windows.is_absolute() or windows.drive:
        return "is absolute"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "has an empty, '.' or '..' part"
    return None


def require_folder(path: Path, advice: str) -> None:
    """Refuse what is no folder.

    Raises:
        SourceNotFoundError: It is something else, or not there; with what to do.
    """
    if not path.is_dir():
        raise SourceNotFoundError(f"{path}: {'not a' if path.exists() else 'no such'} folder; {advice}")


def resolve_inside(root: Path, relative: str) -> Path:
    """The absolute path of a file below root, symlinks followed only where they stay inside.

    A link may also lead into the hub cache's own blobs, which is how downloaded checkpoints look:
    ``models--org--name/snapshots/REVISION/file -> ../../blobs/HASH``.

    Raises:
        ManifestError: relative is unsafe, or a link leads elsewhere.
        SourceNotFoundError, ToolkitError: See `manifests.readable.open_regular`.
    """
    check_relative(relative, what=str(root))
    path = root / relative
    try:
        real = Path(os.path.realpath(path, strict=True))
        real_root = Path(os.path.realpath(root, strict=True))
    except OSError as error:
        raise refusal(path, error) from error
    if not real.is_relative_to(real_root) and real.parent != _hub_blobs(real_root):
        raise ManifestError(f"{path}: a link that leaves the folder, to {real}; copy the file there instead")
    # Whoever opened a FIFO would wait for ever.
    require_regular(path)
    return path


def _hub_blobs(root: Path) -> Path | None:
    # Each quantisation of a GGUF repository is often in a folder of its own within the snapshot.
    snapshot = next((folder for folder in (root, *root.parents) if folder.parent.name == "snapshots"), None)
    return None if snapshot is None else snapshot.parent.parent / "blobs"
