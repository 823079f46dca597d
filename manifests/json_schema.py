"""The published JSON Schema of version 1, for readers in other languages.

It says what a schema can say: keys, types, ranges, patterns. Relations between parts (offsets that follow each
other, digests of digests) are the matter of `manifests.validate` and FORMAT.md.
"""

from typing import Any

from manifests.dtypes import BITS
from manifests.header import LENGTH_BYTES, MAX_DIMENSIONS, MAX_FILE_BYTES, MAX_HEADER_BYTES, MAX_NAME_CHARS
from manifests.paths import Kind
from manifests.schema import CODECS, FORMAT_NAME, FORMAT_VERSION, LAYOUTS, ROLES, SOURCE_KINDS

_COUNT = {"type": "integer", "minimum": 0, "maximum": MAX_FILE_BYTES}
_COUNTS = {"type": "array", "items": _COUNT}
_SHAPE = _COUNTS | {"maxItems": MAX_DIMENSIONS}
# The length says it again, for validators whose "$" also matches before a final newline.
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$", "maxLength": 64}
_PATH = {
    "type": "string",
    "minLength": 1,
    "maxLength": 1024,
    # Relative, forward slashes, no '.', '..' or empty part, no drive letter, no control character.
    "pattern": r"^(?!/)(?!.*(^|/)\.{0,2}(/|$))[^\\:\u0000-\u001f\u007f]+$",
}
_NAME = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, schema]}


def json_schema() -> dict[str, Any]:
    """The schema as a JSON document (draft 2020-12)."""
    tensor = _object(
        {"name": _NAME, "dtype": {"enum": list(BITS)}, "shape": _SHAPE, "offset": _COUNT, "size": _COUNT},
        {
            "digest": _SHA256,
            "chunks": {"type": "array", "items": _SHA256, "minItems": 1},
            "encoding": {"type": "string", "minLength": 1, "maxLength": 40},
            "logical_shape": _SHAPE,
            "source_name": _NAME,
        },
    )
    file = _object(
        {
            "path": _PATH,
            "kind": {"enum": [str(kind) for kind in Kind]},
            "size": _COUNT,
            "header_size": _COUNT | {"maximum": LENGTH_BYTES + MAX_HEADER_BYTES},
            "tensors": {"type": "array", "items": tensor},
        },
        {
            "layer": _COUNT,
            "expert": _COUNT,
            "codec": {"enum": list(CODECS)},
            "stored_sha256": _SHA256,
            "unpacked_size": _COUNT,
            "header_sha256": _SHA256,
            "digest": _SHA256,
        },
    )
    document = _object(
        {"path": _PATH, "role": {"enum": list(ROLES)}, "size": _COUNT, "sha256": _SHA256},
        {"codec": {"enum": list(CODECS)}, "content_size": _COUNT, "content_sha256": _SHA256, "source_name": _PATH},
    )
    shard = _object({"name": _PATH, "size": _COUNT, "sha256": _nullable(_SHA256), "header": _PATH})
    model = _object(
        {},
        {
            "model_type": {"type": "string", "minLength": 1, "maxLength": 1024},
            "num_hidden_layers": _COUNT,
            "n_routed_experts": _COUNT,
            "num_experts_per_tok": _COUNT,
        },
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Manifest of an expert-wise resharded checkpoint",
        **_object(
            {
                "format": {"const": FORMAT_NAME},
                "version": {"const": FORMAT_VERSION},
                "layout": {"enum": list(LAYOUTS)},
                "model": model,
                "selection": _object({"layers": _nullable(_COUNTS), "experts": _nullable(_COUNTS)}),
                "files": {"type": "array", "items": file},
                "documents": {"type": "array", "items": document},
                "source": _nullable(
                    _object({"kind": {"enum": list(SOURCE_KINDS)}, "shards": {"type": "array", "items": shard}})
                ),
            },
            {"manifest_sha256": _SHA256},
        ),
    }
