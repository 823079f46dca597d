"""Opens a model for a command: shows how far the headers on a server are, and says what there is to know of it.

It must not import torch before it is asked for a model: `--help` of every command passes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manifests import urls
from manifests.console import progress
from runner.cli_options import note, note_offline

if TYPE_CHECKING:
    from runner.loaded import LoadedModel


def open_model(model: str | None, *, cache_size: int | None, quiet: bool, **options: Any) -> LoadedModel:
    """The model that a command was told to use.

    Args:
        model: As given with ``-m``.
        cache_size: As given.
        quiet: Whether nothing is said.
        **options: See `LoadedModel`.

    Raises:
        ToolkitError: See `LoadedModel`.
    """
    from runner.loaded import LoadedModel

    note_idle_cache_size(model, cache_size, quiet=quiet)
    with progress("headers", quiet=quiet) as watch:
        loaded = LoadedModel(model, cache_size=cache_size, watch=watch, **options)
    note_offline(loaded, quiet=quiet)
    return loaded


def note_idle_cache_size(model: str | None, cache_size: int | None, *, quiet: bool) -> None:
    """Say that ``--cache-size`` bounds nothing where nothing is fetched."""
    if cache_size is not None and not urls.is_url(model):
        note("note: the model is on this machine, so --cache-size does nothing", quiet=quiet)
