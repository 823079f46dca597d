"""config.json and its like, small JSON objects of a checkpoint; and the few values of it that counting needs."""

from collections.abc import Mapping
from typing import Any, Protocol

from manifests.errors import ManifestError
from manifests.header import MAX_FILE_BYTES
from manifests.jsontext import parse_json
from manifests.schema import ModelFacts

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 1 << 24


class Files(Protocol):
    """What small files are read from: a folder, or the auxiliary files of a checkpoint."""

    def where(self, name: str) -> str:
        """A file's full name for messages."""

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """All bytes of a small file; None when there is none."""


def read_object(files: Files, name: str) -> Mapping[str, Any]:
    """A JSON object of a checkpoint; empty when it has no such file.

    Raises:
        ManifestError: It is not a JSON object.
    """
    raw = files.read(name, max_bytes=MAX_CONFIG_BYTES)
    if raw is None:
        return {}
    document = parse_json(raw, what=files.where(name))
    if not isinstance(document, dict):
        raise ManifestError(f"{files.where(name)}: must be a JSON object")
    return document


def read_config(folder: Files) -> Mapping[str, Any]:
    """config.json; empty when there is none.

    Raises:
        ManifestError: It is not a JSON object.
    """
    return read_object(folder, CONFIG_NAME)


def model_facts(config: Mapping[str, Any]) -> ModelFacts:
    """The values that counting needs; what is absent or no whole number is None."""

    def count(key: str) -> int | None:
        value = config.get(key)
        return value if type(value) is int and 0 <= value <= MAX_FILE_BYTES else None

    model_type = config.get("model_type")
    return ModelFacts(
        model_type=model_type if isinstance(model_type, str) and 0 < len(model_type) <= 100 else None,
        num_hidden_layers=count("num_hidden_layers"),
        n_routed_experts=count("n_routed_experts"),
        num_experts_per_tok=count("num_experts_per_tok"),
    )
