"""Run DeepSeek-style mixture-of-experts checkpoints on machines whose memory is smaller than the model.

    >>> import runner
    >>> model = runner.load()                         # the embedded demo; or the folder of a checkpoint
    >>> print(model.generate("def ", max_tokens=32))
    >>> logits = model.logits([0, 17, 4])             # [3, V] float32

Importing this package imports no torch; `load` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.loaded import LoadedModel

__all__ = ["load"]


def load(
    path: str | Path | None = None,
    *,
    ctx: int | None = None,
    ram: int | None = None,
    io: str | None = None,
    cache_size: int | None = None,
) -> LoadedModel:
    """Open a checkpoint for running. Weights are read when they are first used.

    Args:
        path: A resharded checkpoint or a plain checkpoint folder, or its address; None for the embedded demo model.
        ctx: The most positions that a text may have; when not given, what memory and model allow.
        ram: Bytes that the process may take in all; what the machine has to give when not given.
        io: ``mmap`` or ``direct``, how experts come into memory; mapped where products are compiled when not given.
        cache_size: Bytes of disk that may keep what is fetched of checkpoints on servers; any number when not given.

    Raises:
        SourceNotFoundError: There is no checkpoint.
        ResourceError: The memory is too small for it.
        ManifestError: It is damaged.
        UnsupportedModelError: It asks for something that is not implemented.
    """
    from runner.loaded import LoadedModel

    return LoadedModel(path, ctx=ctx, ram=ram, io=io, cache_size=cache_size)
