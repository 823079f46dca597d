"""config.json of a checkpoint, and the few values of it that counting needs."""

from collections.abc import Mapping
from typing import Any

from manifests.errors import ManifestError
from manifests.folder import Folder
from manifests.header import MAX_FILE_BYTES
from manifests.jsontext import parse_json
from manifests.schema import ModelFacts

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 10_000_000


def read_config(folder: Folder) -> Mapping[str, Any]:
    """config.json of a folder; empty when it has none.

    Raises:
        ManifestError: It is not a JSON object.
    """
    raw = folder.read(CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES)
    if raw is None:
        return {}
    config = parse_json(raw, what=folder.where(CONFIG_NAME))
    if not isinstance(config, dict):
        raise ManifestError(f"{folder.where(CONFIG_NAME)}: must be a JSON object")
    return config


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
