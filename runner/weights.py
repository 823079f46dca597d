"""The tensors of a checkpoint under their names, in the stored dtype, brought in when first asked for.

Dense weights lie in memory of our own; routed experts pass through a window; of the embedding only the rows that are
asked for are read. A layer or expert that no token needs is never opened. This file knows names and files; it must
not know what the tensors mean.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from manifests.errors import IntegrityError, ToolkitError
from runner import split_kv
from runner.background import Background
from runner.contents import Contents, group_of
from runner.dense import DenseWeights
from runner.fp8 import Matrix, stored_matrix
from runner.layout import PAGE_BYTES
from runner.memory import dtype_of
from runner.policy import Key, Policy
from runner.reading import Direct, Files, Mapped, Way
from runner.residency import URGENT, ExpertWindow, HeldExpert
from runner.telemetry import Usage


class WeightStore:
    """The tensors of a checkpoint.

    Args:
        contents: What the checkpoint has.
        order: Groups in the order in which a pass uses them, see `contents.pass_order`; each is read while those
            before it are used.
        experts: Routed experts that may be asked for.
        slots: How many of these may be in memory at once; all when not given.
        io: How experts come in: ``mmap`` or ``direct``.
    """

    def __init__(
        self,
        contents: Contents,
        *,
        order: Sequence[str] = (),
        experts: Sequence[Key] = (),
        slots: int | None = None,
        io: str = "direct",
    ) -> None:
        self._contents = contents
        self._files = files = contents.open_files()
        self._background = background = Background(files.loads_at_once, lambda: files.fetching_s)
        self._dense = DenseWeights(contents.group, contents.with_halves(order), Direct(files), background)
        if io == "mmap" and not isinstance(files, Files):
            # A mapping would outlive the lock that keeps others from freeing what is mapped.
            raise ToolkitError(f"{contents}: is read from a server, and cannot be mapped; leave --io mmap out")
        way: Way = Mapped(files) if io == "mmap" and isinstance(files, Files) else Direct(files)
        self._window = ExpertWindow(
            lambda key: contents.expert(key, way.alignment),
            slots=max(1, len(experts)) if slots is None else slots,
            slot_bytes=contents.slot_bytes(sorted({layer for layer, _ in experts}), way.alignment),
            way=way,
            background=background,
            policy=Policy(),
        )
        self._rows_read = 0
        self._rows_wait_s = 0.0
        self._joined: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._contents

    @property
    def read_bytes(self) -> int:
        """Bytes that were read so far: what `usage` says too, but quickly."""
        return self._dense.read_bytes + self._window.counters.read_bytes + self._rows_read

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came from a server so far: what `usage` says too, but quickly."""
        return self._files.fetched_bytes

    @property
    def usage(self) -> Usage:
        """What was read and held so far."""
        counters = self._window.counters
        return Usage(
            files=self._files.opened,
            read_bytes=self.read_bytes,
            expert_hits=counters.hits,
            expert_misses=counters.misses,
            wait_s=self._dense.wait_s + counters.wait_s + self._rows_wait_s,
            fetched_bytes=self.fetched_bytes,
            fetch_wait_s=self._background.metered,
            resident_bytes=self._window.held_bytes
            + self._dense.held_bytes
            + sum(tensor.nbytes for tensor in self._joined.values()),
        )

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored dtype and shape. It must not be written to.

        Raises:
            ManifestError: The checkpoint has no such tensor.
            SourceNotFoundError: Its file is gone.
            IntegrityError: Its file has another size than the manifest says, or was replaced while in use.
            ResourceError: The system has no room for it.
            UnsupportedModelError: It is stored in a way that the runner does not read.
        """
        found = self._dense.group(group_of(name)).get(name)
        if found is None:
            location = self._contents.locate(name)  # refuses what the checkpoint does not have
            # It has no bytes.
            return torch.empty(location.shape, dtype=dtype_of(name, location.dtype, location.encoding))
        return found

    def matrix(self, prefix: str) -> Matrix:
        """``prefix.weight`` as it is stored, with ``prefix.weight_scale_inv`` when that is FP8.

        What the checkpoint has in two halves is made of them, and kept in their place; see `runner.split_kv`.

        Raises:
            ManifestError: The weight, or its scales, are not in the checkpoint.
            Others: See `tensor` and `dequantize`.
        """
        name, scale_name = f"{prefix}.weight", f"{prefix}.weight_scale_inv"
        if (parts := split_kv.halves(name, self)) is not None:
            if name not in self._joined:
                k_b, v_b = (self.matrix(part.removesuffix(".weight")) for part in parts)
                self._joined[name] = split_kv.join(k_b, v_b)
                self._dense.let_go(group_of(parts[0]))
            return Matrix(weight=self._joined[name], scale=None, name=name)
        scale = self.tensor(scale_name) if scale_name in self else None
        return stored_matrix(prefix, self.tensor(name), scale, self._contents.encoding(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what a tensor stands for; it is not read for it.

        Raises:
            ManifestError: The checkpoint has no such tensor.
        """
        return self._contents.locate(name).logical_shape

    def rows(self, name: str, ids: Sequence[int]) -> Matrix:
        """Some rows of a matrix as they are stored, len(ids) of them; no others are read.

        Raises:
            See `tensor`.
        """
        location = self._contents.locate(name)
        dtype = dtype_of(name, location.dtype, location.encoding)
        row_bytes = location.shape[1] * dtype.itemsize
        found = bytearray(len(ids) * row_bytes)
        begins = [location.offset + row * row_bytes for row in ids]
        work = partial(self._read_rows, location.file, begins, row_bytes, memoryview(found))
        if isinstance(self._files, Files):
            work()
        else:
            # There, so that an interrupt ends the waiting and not the work.
            begin = time.perf_counter()
            try:
                self._background.submit(work, urgency=URGENT).wait()
            finally:
                self._rows_wait_s += time.perf_counter() - begin
        self._rows_read += len(found)
        rows = torch.frombuffer(found, dtype=dtype).view(len(ids), location.shape[1])
        return Matrix(weight=rows, scale=None, name=name, encoding=location.encoding)

    def _read_rows(self, file: str, begins: Sequence[int], size: int, view: memoryview) -> None:
        """Read parts of one size of a file, one behind the other."""
        where = self._files.where(file)
        parts = [(file, begin, begin + size) for begin in begins]
        with self._files.holding(parts) as open_file, open_file(file, False) as (descriptor, _):
            for number, at in enumerate(begins):
                try:
                    count = os.preadv(descriptor, [view[number * size : (number + 1) * size]], at)
                except OSError as error:
                    raise ToolkitError(f"{where}: cannot be read at byte {at}: {error.strerror}") from error
                if count < size:
                    raise IntegrityError(f"{where}: ends at byte {at + count}; it was cut while in use")

    def dense_tensors(self) -> Iterator[Tensor]:
        """All dense weights that are in memory and that products read."""
        yield from self._dense.tensors()
        yield from self._joined.values()

    def forget_cached(self, experts: Sequence[Key]) -> None:
        """Ask the system to put these experts' files out of its cache; those that are mapped stay."""
        for key in experts:
            self._files.forget(self._contents.expert(key, PAGE_BYTES))

    def begin_pass(self) -> None:
        """A pass through the model begins: what was used long ago counts less from now on."""
        self._window.tick()

    def expert_groups(self, layer: int, experts: Sequence[int]) -> Iterator[Iterator[list[HeldExpert]]]:
        """Routed experts of one layer as they arrive; see `ExpertWindow.groups`."""
        return self._window.groups(layer, experts)

    def pin(self, experts: Sequence[Key]) -> None:
        """Keep these experts in memory from now on; see `ExpertWindow.pin`."""
        self._window.pin(experts)
