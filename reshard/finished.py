"""A finished checkpoint that a run finds in its destination: whether it is still whole.

Nothing of it is written or mended here; that is what `reshard.repair` is for.
"""

from pathlib import Path

from manifests.check import check_files
from manifests.checkpoint import Checkpoint
from manifests.errors import IntegrityError
from manifests.folder import LocalFolder
from manifests.schema import Manifest
from reshard.progress import Progress
from reshard.verify import verify

_MENDED = "`reshard repair DST --from SRC` brings back what is wrong"


def require_whole(manifest: Manifest, folder: Path) -> None:
    """Refuse a checkpoint of which a file is gone, or has another size or header.

    Raises:
        IntegrityError: With the file and what to do.
    """
    problems = check_files(Checkpoint(LocalFolder(folder), manifest))
    if problems:
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise IntegrityError(f"{folder / problems[0].loc}: {problems[0].message}{more}; {_MENDED}")


def require_right(manifest: Manifest, folder: Path, *, jobs: int, progress: Progress) -> None:
    """Refuse a checkpoint in which any byte is wrong; reads all of it.

    Raises:
        IntegrityError: With the first that is.
    """
    found = verify(Checkpoint(LocalFolder(folder), manifest), jobs=jobs, progress=progress)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise IntegrityError(f"{folder / found[0].path}: {found[0].message}{more}; {_MENDED}")
