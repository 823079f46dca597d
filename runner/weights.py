"""Maps files when a tensor of theirs is first asked for, and hands out views in the stored dtype.

Nothing is read here: the kernel brings a page in when the mathematics touches it. A layer or expert that no token
needs is never opened. This file knows names and files; it must not know what the tensors mean.
"""

import warnings

import torch
from torch import Tensor

from manifests.errors import ManifestError, UnsupportedModelError
from manifests.inventory import Checkpoint, Location
from runner.fp8 import Matrix

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}


class WeightStore:
    """The tensors of a checkpoint under their names.

    Attributes:
        mapped_files: Files mapped so far.
        mapped_bytes: Their sizes together; what was read of them is less.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._mappings: dict[str, memoryview] = {}
        self._views: dict[str, Tensor] = {}

    @property
    def mapped_files(self) -> int:
        """How many files are mapped."""
        return len(self._mappings)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of address space that the mapped files take."""
        return sum(map(len, self._mappings.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def tensor(self, name: str) -> Tensor:
        """A view of a tensor's mapped bytes, in its stored dtype and shape. It must not be written to.

        Raises:
            ManifestError: The checkpoint has no such tensor.
            SourceNotFoundError: Its file is gone.
            IntegrityError: Its file has another size than the manifest says.
            ResourceError: The system has no room for another mapping.
            UnsupportedModelError: It is stored in a way that the runner does not read.
        """
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = self._view(name)
        return view

    def matrix(self, prefix: str) -> Matrix:
        """``prefix.weight``, with ``prefix.weight_scale_inv`` when it is stored in FP8.

        Raises:
            ManifestError: The weight, or its scales, are not in the checkpoint.
            Others: See `tensor`.
        """
        weight = self.tensor(f"{prefix}.weight")
        if weight.dtype is not torch.float8_e4m3fn:
            return Matrix(weight=weight, scale=None)
        if f"{prefix}.weight_scale_inv" not in self:
            raise ManifestError(f"{prefix}.weight is FP8 but has no weight_scale_inv; download the checkpoint again")
        return Matrix(weight=weight, scale=self.tensor(f"{prefix}.weight_scale_inv"))

    def _view(self, name: str) -> Tensor:
        location = self._checkpoint.find(name)
        if location is None:
            left_out = "" if self._checkpoint.manifest.selection.is_everything else ", only a part was resharded"
            raise ManifestError(f"{self._checkpoint.root}: has no tensor {name}{left_out}")
        dtype = _DTYPES.get(location.dtype)
        if dtype is None:
            raise UnsupportedModelError(
                f"{name} is stored as {location.dtype}; the runner reads {', '.join(sorted(_DTYPES))}"
            )
        if location.size == 0:
            return torch.empty(location.shape, dtype=dtype)
        # The published shards have no padding, so offsets may be odd even for four-byte elements. torch reads such
        # views; only `Tensor.view(dtype)` refuses them, so the dtype is given here.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                self._map(location), dtype=dtype, count=location.size // dtype.itemsize, offset=location.offset
            )
        return flat.view(location.shape)

    def _map(self, location: Location) -> memoryview:
        mapping = self._mappings.get(location.file)
        if mapping is None:
            mapping = self._mappings[location.file] = self._checkpoint.map_file(location.file)
        return mapping
