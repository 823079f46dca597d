"""Opens a checkpoint for running, wherever it lies, and refuses what cannot be run before anything is read of it."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import manifests
from manifests import gguf_files, urls
from manifests.errors import ManifestError, SourceNotFoundError, UnsupportedModelError
from manifests.gguf_names import ARCHITECTURE
from manifests.inventory import open_model
from manifests.remote import Watch
from manifests.schema import PLAIN
from runner import demo, kernels, quantised
from runner.config import ModelConfig
from runner.remote_checkpoint import open_cached


def open_checkpoint(
    path: str | Path | None, cache_size: int | None = None, watch: Watch | None = None
) -> manifests.Checkpoint:
    """Open a checkpoint for running; None is the embedded demo model.

    Args:
        path: Its path or its address.
        cache_size: See `LoadedModel`.
        watch: See `LoadedModel`.

    Raises:
        SourceNotFoundError: There is none, or it has no config.json, or is a part of one.
        ManifestError, IntegrityError: It is damaged.
        RemoteError: Its server cannot be reached, and the cache has nothing of it.
        ToolkitError: It has quantised blocks of a rare type, and the package gguf is not installed.
        UnsupportedModelError: It is of another architecture, or is stored in a way that the runner does not read.
    """
    if path is None:
        path = demo.path()
        if not path.is_dir():
            raise SourceNotFoundError(f"{path}: the embedded model is not installed; name a checkpoint with -m")
    if Path(path).suffix != gguf_files.SUFFIX and Path(path).is_file():
        raise SourceNotFoundError(f"{path}: is one file; give the folder of the whole checkpoint")
    checkpoint = open_cached(str(path), cache_size, watch) if urls.is_url(path) else open_model(path)
    if not checkpoint.config:
        _refuse_without_config(path, checkpoint)
    if faults := checkpoint.unreadable():
        raise UnsupportedModelError(f"{checkpoint.folder}: {faults[0]}")
    _check_encodings(checkpoint)
    return checkpoint


def config_of(checkpoint: manifests.Checkpoint) -> ModelConfig:
    """What a checkpoint says about its model, checked; of a GGUF file it is made from the metadata.

    Raises:
        ManifestError: A value is missing or impossible.
        UnsupportedModelError: It asks for something that is not implemented.
    """
    try:
        return ModelConfig.from_dict(checkpoint.config)
    except (ManifestError, UnsupportedModelError) as error:
        first = checkpoint.manifest.files[0].path
        if not first.endswith(gguf_files.SUFFIX):
            raise
        # There is no config.json that somebody could look at.
        raise type(error)(f"{checkpoint.folder.where(first)}: as its metadata has it, {error}") from error


def _refuse_without_config(path: str | Path, checkpoint: manifests.Checkpoint) -> NoReturn:
    if all(Path(file.path).suffix != gguf_files.SUFFIX for file in checkpoint.manifest.files):
        raise SourceNotFoundError(
            f"{checkpoint.folder}: no config.json, which says what the model is; copy the model's own there"
        )
    architecture = checkpoint.manifest.model.model_type
    raise UnsupportedModelError(
        f"{urls.shown_path(path)}: is of architecture {architecture!r:.60}; the runner knows {ARCHITECTURE}"
    )


def _check_encodings(checkpoint: manifests.Checkpoint) -> None:
    """Refuse blocks that cannot be expanded now, and not when a token first needs them.

    Raises:
        UnsupportedModelError: They are of a type that is not known.
        IntegrityError: They are not what the checkpoint says.
        ToolkitError: No kernel expands them, and the package that does is not installed.
    """
    encoded = [one for file in checkpoint.manifest.files for one in file.tensors if one.encoding != PLAIN]
    for one in encoded:
        where = f"{checkpoint.folder}: {one.name}"
        quantised.check_described(one.dtype, one.shape, one.logical_shape, one.encoding, where)
    foreign = next((one for one in encoded if not kernels.expands(one.encoding)), None)
    if foreign is not None:
        quantised.need_package(f"{checkpoint.folder}: {foreign.name}", foreign.encoding)
