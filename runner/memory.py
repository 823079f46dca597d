"""Address space of our own: anonymous memory in huge pages, files mapped over parts of it, tensors as views of it.

The addresses are reserved at once and memory is taken when a page is first touched, so room for every expert of a
model may be reserved on a machine that holds a few. This file must not know experts or checkpoints.
"""

import ctypes
import errno
import mmap
import os
import weakref

import torch
from torch import Tensor

from manifests.errors import ResourceError, UnsupportedModelError
from manifests.schema import PLAIN
from runner import kernels
from runner.layout import HUGE_PAGE_BYTES, Layout

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""What the runner reads, by safetensors tag."""

_libc = ctypes.CDLL(None, use_errno=True)
_pointer, _size = ctypes.c_void_p, ctypes.c_size_t
_libc.mmap.restype = _pointer
_libc.mmap.argtypes = (_pointer, _size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (_pointer, _size)
_libc.madvise.argtypes = (_pointer, _size, ctypes.c_int)

_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000 if hasattr(mmap, "MADV_HUGEPAGE") else 0  # of Linux
_POPULATE_READ = 22


class Region:
    """A range of addresses, a multiple of huge pages, that begins at one.

    Args:
        size: Bytes, more than 0.

    Attributes:
        address: Its first byte.
        size: As given, rounded up to huge pages.

    Raises:
        ResourceError: The system has no room for it.
    """

    def __init__(self, size: int) -> None:
        self.size = -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        whole = self.size + HUGE_PAGE_BYTES
        base = _libc.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if base == _FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise ResourceError(f"the system has no room for {self.size} bytes of weights ({reason}); give less --ram")
        self.address = -(-base // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        if hasattr(mmap, "MADV_HUGEPAGE"):
            _libc.madvise(self.address, self.size, mmap.MADV_HUGEPAGE)
        self._bytes = (ctypes.c_ubyte * self.size).from_address(self.address)
        # Views hold the array, so the memory goes with the last of them; not at the end of the process, when threads
        # may still read.
        weakref.finalize(self._bytes, _libc.munmap, base, whole).atexit = False

    def bytes(self, position: int, size: int) -> memoryview:
        """A part as writable bytes."""
        return memoryview(self._bytes).cast("B")[position : position + size]

    def tensors(self, layout: Layout, position: int) -> dict[str, Tensor]:
        """Views of the tensors of a layout that begins at ``position``; they must not be written to.

        Raises:
            UnsupportedModelError: One is stored in a way that the runner does not read.
        """
        found = {}
        for name, place in layout.places.items():
            dtype = dtype_of(name, place.dtype, place.encoding)
            count = 1
            for length in place.shape:
                count *= length
            # The published shards have no padding, so offsets may be odd even for four-byte elements. torch reads
            # such views; only `Tensor.view(dtype)` refuses them, so the dtype is given here.
            flat = torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=position + place.position)
            found[name] = flat.view(place.shape)
        return found

    def map_file(self, position: int, size: int, descriptor: int, offset: int) -> None:
        """Put a part of a file in place of the memory, read-only, in huge pages where the system has them.

        Raises:
            OSError: It cannot be mapped.
        """
        flags = mmap.MAP_SHARED | _MAP_FIXED
        address = self.address + position
        if _libc.mmap(address, size, mmap.PROT_READ, flags, descriptor, offset) == _FAILED:
            raise _last_error()
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Before the first touch: it decides the size of the pages that the file is read in.
            _libc.madvise(address, size, mmap.MADV_HUGEPAGE)

    def populate(self, position: int, size: int) -> bool:
        """Bring in every page of a part at once; False where the system cannot.

        Raises:
            OSError: A page cannot be had: its file was cut, or the disk failed.
        """
        address = self.address + position
        begin = address // mmap.PAGESIZE * mmap.PAGESIZE
        if _libc.madvise(begin, address + size - begin, _POPULATE_READ) == 0:
            return True
        error = _last_error()
        if error.errno == errno.EINVAL:
            return False
        raise error

    def clear(self, position: int, size: int) -> None:
        """Give a part's memory back, or the file that lies over it; it reads as zeros then."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        _libc.mmap(self.address + position, size, protection, flags, -1, 0)


class Guard:
    """Flags the parts of a region whose files were cut while they were mapped; they read as zeros from then on.

    Without it, touching a page behind the end of a mapped file ends the process. It needs the compiled library.

    Args:
        region: What is mapped over.
        part_bytes: Size of one part.

    Raises:
        ResourceError: There are too many guards already.
    """

    def __init__(self, region: Region, part_bytes: int) -> None:
        found = kernels.library()
        if found is None:
            raise ResourceError("mapped weights cannot be guarded without the compiled library; use --io direct")
        self._broken = (ctypes.c_ubyte * -(-region.size // part_bytes))()
        number = found.rk_guard(region.address, region.size, part_bytes, self._broken)
        if number < 0:
            raise ResourceError("too many models are open with mapped weights; close some, or use --io direct")
        weakref.finalize(self, _unguard, found, number, region, self._broken)

    def renew(self, part: int) -> None:
        """Forget what was flagged: something else lies there now."""
        self._broken[part] = 0

    def is_broken(self, part: int) -> bool:
        """Whether a page of this part could not be had."""
        return bool(self._broken[part])


def _unguard(found: ctypes.CDLL, number: int, *_kept: object) -> None:
    found.rk_unguard(number)


def dtype_of(name: str, tag: str, encoding: str = PLAIN) -> torch.dtype:
    """The dtype of a safetensors tag; bytes are read only where they encode something.

    Raises:
        UnsupportedModelError: The runner does not read it.
    """
    dtype = DTYPES.get(tag) if encoding == PLAIN or tag != "U8" else torch.uint8
    if dtype is None:
        raise UnsupportedModelError(f"{name} is stored as {tag}; the runner reads {', '.join(sorted(DTYPES))}")
    return dtype


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
