"""Files that a resharded checkpoint needs and its source has in no file: config and tokenizer out of a GGUF file."""

import json
from collections.abc import Mapping
from typing import Any


def config_document(config: Mapping[str, Any]) -> bytes:
    """config.json; the same config gives the same bytes."""
    return json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
