"""What a folder's file system is and can do, tried out with small files: for `doctor`, and free inodes for `plan`.

Knows folders; it must not know checkpoints.
"""

import ctypes
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from manifests.storage import sync_folder
from reshard.blocks import ALIGN_BYTES, aligned_buffer, write_error

MOUNTS = Path("/proc/self/mounts")

NETWORK_TYPES = frozenset({"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "lustre", "nfs", "nfs4", "smb3"})
MEMORY_TYPES = frozenset({"ramfs", "tmpfs"})

SPARSE_BYTES = 64 << 20

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What was tried in a folder.

    Attributes:
        direct_write, direct_read: Whether O_DIRECT works.
        punch_hole: Whether a part of a file can be freed.
        sparse: Whether what was never written takes no space.
        lock: Whether a folder can be locked.
        tells_case: Whether names that differ in case alone are two names.
    """

    direct_write: bool
    direct_read: bool
    punch_hole: bool
    sparse: bool
    lock: bool
    tells_case: bool


def existing_folder(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists, links followed."""
    existing = Path(os.path.realpath(path))
    while not existing.exists():
        existing = existing.parent
    return existing


def type_of(folder: Path) -> str | None:
    """Type of the file system, such as ``ext4``; None where the system does not say."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    found, depth = None, -1
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        # Blanks and the like are octal there. The last of two mounts at one place hides the first.
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount))
        if len(point.parts) >= depth and folder.is_relative_to(point):
            found, depth = kind, len(point.parts)
    return found


def free_inodes(path: Path) -> int | None:
    """How many files can still be made; None where there is no such limit. The path need not exist yet."""
    found = os.statvfs(existing_folder(path))
    return found.f_favail if found.f_files else None


@contextmanager
def trial_folder(parent: Path) -> Iterator[Path]:
    """A new folder to try things in, removed whatever happens.

    Raises:
        ResourceError: The disk is full.
        ToolkitError: No folder can be made there, or the disk reports an error.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".reshard-doctor-", dir=parent))
    except OSError as error:
        raise write_error(parent, error) from error
    try:
        yield folder
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def try_renaming(folder: Path) -> None:
    """Do what makes a file durable and whole: fsync it, rename it over another, fsync its folder.

    Raises:
        OSError: One of them does not work.
    """
    for name in ("old", "new"):
        (folder / name).write_bytes(name.encode())
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
    os.rename(folder / "new", folder / "old")
    sync_folder(folder)
    if (folder / "old").read_bytes() != b"new" or (folder / "new").exists():
        raise OSError(0, "a renamed file is not in its new place")


def try_abilities(folder: Path) -> Abilities:
    """Try everything that a run can do without.

    Raises:
        OSError: Not even a small file can be written.
    """
    (folder / "direct").write_bytes(bytes(ALIGN_BYTES))
    return Abilities(
        direct_write=_try_direct(folder / "direct", os.O_WRONLY),
        direct_read=reads_directly(folder / "direct"),
        punch_hole=_try_punching(folder / "punched"),
        sparse=_try_sparse(folder / "sparse"),
        lock=_try_locking(folder),
        tells_case=_try_case(folder),
    )


def reads_directly(path: Path) -> bool:
    """Whether a file can be read past the page cache."""
    return _try_direct(path, os.O_RDONLY)


def _try_direct(path: Path, flags: int) -> bool:
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        descriptor = os.open(path, flags | os.O_DIRECT)
    except OSError:
        return False
    try:
        page = aligned_buffer(ALIGN_BYTES)
        if flags & os.O_WRONLY:
            os.pwrite(descriptor, page, 0)
        else:
            os.preadv(descriptor, [page], 0)
    except OSError:  # some say it late
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _try_punching(path: Path) -> bool:
    with path.open("wb") as file:
        file.write(bytes(16 * ALIGN_BYTES))
        file.flush()
        try:
            fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        except (AttributeError, OSError):
            return False
        offset, size = ctypes.c_int64(ALIGN_BYTES), ctypes.c_int64(8 * ALIGN_BYTES)
        return bool(fallocate(file.fileno(), _KEEP_SIZE | _PUNCH_HOLE, offset, size) == 0)


def _try_sparse(path: Path) -> bool:
    with path.open("wb") as file:
        os.ftruncate(file.fileno(), SPARSE_BYTES)
        os.pwrite(file.fileno(), b"end", SPARSE_BYTES - 3)
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_blocks * 512 < SPARSE_BYTES


def _try_locking(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _try_case(folder: Path) -> bool:
    (folder / "case").touch()
    return not (folder / "CASE").exists()
