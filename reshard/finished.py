"""A finished checkpoint that a run finds in its destination: whether it is still whole.

Nothing of it is written or mended here; that is what `reshard.repair` is for.
"""

from pathlib import Path

from manifests.checkpoint import Checkpoint
from manifests.errors import IntegrityError
from manifests.folder import LocalFolder
from manifests.schema import Document, FileEntry, Manifest
from reshard.progress import Progress
from reshard.verify import verify

_MENDED = "`reshard repair DST --from SRC` brings back what is wrong"


def require_whole(manifest: Manifest, folder: Path) -> None:
    """Refuse a checkpoint of which a file is gone or has another size.

    Raises:
        IntegrityError: With the file and what to do.
    """
    entries: list[FileEntry | Document] = [*manifest.files, *manifest.documents]
    for entry in entries:
        path = folder / entry.path
        found = path.stat().st_size if path.is_file() else None
        if found != entry.size:
            fault = "is missing" if found is None else f"has {found} bytes, the manifest says {entry.size}"
            raise IntegrityError(f"{path}: {fault}; {_MENDED}")


def require_right(manifest: Manifest, folder: Path, *, jobs: int, progress: Progress) -> None:
    """Refuse a checkpoint in which any byte is wrong; reads all of it.

    Raises:
        IntegrityError: With the first that is.
    """
    found = verify(Checkpoint(LocalFolder(folder), manifest), jobs=jobs, progress=progress)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise IntegrityError(f"{folder / found[0].path}: {found[0].message}{more}; {_MENDED}")
