"""The dataclasses, the document and FORMAT.md say the same; the JSON Schema is one and agrees with `validate`."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import manifests
from manifests import schema as schema_module
from manifests.json_schema import json_schema
from manifests.paths import Kind
from manifests.schema import FileEntry, Manifest, Selection, TensorEntry, to_document
from manifests.validate import parse, validate

SCHEMA = json_schema()


def test_there_and_back(good: dict[str, Any], v3_resharded: Path) -> None:
    assert to_document(parse(good)) == good
    on_disk = json.loads((v3_resharded / "manifest.json").read_bytes())
    del on_disk["manifest_sha256"]
    manifest = parse(on_disk)
    assert to_document(manifest) == on_disk
    assert parse(to_document(manifest)) == manifest


def test_defaults_may_be_spelled_out(good: dict[str, Any]) -> None:
    spelled = copy.deepcopy(good)
    spelled["files"][0]["tensors"][1] |= {"encoding": "plain", "logical_shape": [0]}
    spelled["files"][0]["codec"] = "none"
    assert parse(spelled) == parse(good)


@pytest.mark.parametrize(
    "cls",
    [c for c in vars(schema_module).values() if dataclasses.is_dataclass(c)],
    ids=lambda cls: cls.__name__,
)
def test_dataclasses_are_frozen_slotted_and_keyword_only(cls: type) -> None:
    parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert "__slots__" in vars(cls)
    assert all(field.kw_only for field in dataclasses.fields(cls))


def test_selection() -> None:
    everything, some = Selection(), Selection(layers=(0, 3), experts=(7,))
    assert everything.is_everything
    assert everything.includes(5, 9)
    assert not some.is_everything
    assert not Selection(layers=()).is_everything
    assert some.includes(None, None)
    assert some.includes(3, None)
    assert some.includes(3, 7)
    assert not some.includes(3, 8)
    assert not some.includes(1, 7)
    assert not Selection(layers=()).includes(0, None)
    assert not Selection(experts=()).includes(0, 0)


def table(text: str, title: str) -> set[str]:
    """The first column of the first table below a line of FORMAT.md."""
    lines = text[text.index(f"\n{title}\n") :].splitlines()[2:]
    rows: list[str] = []
    for line in lines:
        if line.startswith("|"):
            rows.append(line.split("|")[1])
        elif rows:
            break
    return {key for row in rows[2:] for key in re.findall(r"`(\w+)`", row)}


def test_format_md_names_exactly_the_keys_of_the_schema() -> None:
    text = (Path(manifests.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    whole = SCHEMA["properties"]
    file = whole["files"]["items"]["properties"]
    assert (
        table(
            text,
            "`manifests schema` prints a JSON Schema. A reader refuses a `format` or `version` that it does not know.",
        )
        == whole.keys()
    )
    assert table(text, "A file:") == file.keys()
    assert table(text, "A tensor:") == file["tensors"]["items"]["properties"].keys()
    assert table(text, "A document:") == whole["documents"]["items"]["properties"].keys()
    shard = whole["source"]["anyOf"][1]["properties"]["shards"]["items"]["properties"]
    line = next(line for line in text.splitlines() if line.startswith("A shard:"))
    assert all(f"`{key}`" in line + text[text.index(line) :].splitlines()[1] for key in shard)
    assert schema_module.FORMAT_VERSION == whole["version"]["const"] == 1


def test_the_schema_is_a_json_schema_that_takes_good_documents(good: dict[str, Any], v3_resharded: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(good, SCHEMA)
    jsonschema.validate(json.loads((v3_resharded / "manifest.json").read_bytes()), SCHEMA)
    in_place = manifests.open(v3_resharded / "model" / "head.safetensors").manifest
    jsonschema.validate(to_document(in_place), SCHEMA)
    assert parse(to_document(in_place)) == in_place


CAN = {
    "unknown key": lambda d: d.update(comment="hi"),
    "unknown key deep inside": lambda d: d["files"][1]["tensors"][0].update(strides=[1]),
    "missing key": lambda d: d.pop("selection"),
    "missing key deep inside": lambda d: d["files"][0]["tensors"][0].pop("offset"),
    "another format": lambda d: d.update(format="gguf"),
    "a later version": lambda d: d.update(version=2),
    "a version in words": lambda d: d.update(version="1"),
    "an unknown layout": lambda d: d.update(layout="flat"),
    "an unknown dtype": lambda d: d["files"][0]["tensors"][0].update(dtype="F12"),
    "an unknown kind": lambda d: d["files"][0].update(kind="router"),
    "an unknown role": lambda d: d["documents"][0].update(role="virus"),
    "an unknown codec": lambda d: d["files"][2].update(codec="gzip"),
    "an unknown source": lambda d: d["source"].update(kind="zip"),
    "a negative size": lambda d: d["files"][0].update(size=-1),
    "a huge size": lambda d: d["files"][0].update(size=1 << 63),
    "a float size": lambda d: d["files"][0].update(size=4232.5),
    "a bool size": lambda d: d["documents"][0].update(size=True),
    "a header of a gigabyte": lambda d: d["files"][0].update(header_size=1 << 30),
    "a null layer": lambda d: d["files"][0].update(layer=None),
    "a null digest": lambda d: d["files"][0].update(digest=None),
    "an upper-case digest": lambda d: d["files"][0].update(digest=d["files"][0]["digest"].upper()),
    "a short digest": lambda d: d["documents"][0].update(sha256="ab"),
    "a digest with a newline": lambda d: d["documents"][0].update(sha256="a" * 64 + "\n"),
    "a null digest of itself": lambda d: d.update(manifest_sha256=None),
    "an empty name": lambda d: d["files"][0]["tensors"][0].update(name=""),
    "a long name": lambda d: d["files"][0]["tensors"][0].update(name="n" * 1025),
    "an empty list of chunks": lambda d: d["files"][1]["tensors"][0].update(chunks=[]),
    "a negative shape": lambda d: d["files"][0]["tensors"][0].update(shape=[-1, 136]),
    "a selection of text": lambda d: d["selection"].update(layers="3-4"),
    "a model of another kind": lambda d: d["model"].update(num_hidden_layers="61"),
    "a path with ..": lambda d: d["documents"][0].update(path="a/../b"),
    "an absolute path": lambda d: d["documents"][0].update(path="/etc/passwd"),
    "a drive": lambda d: d["documents"][0].update(source_name="C:/x"),
    "a backslash": lambda d: d["source"]["shards"][0].update(name="a\\b"),
    "a control character": lambda d: d["documents"][0].update(path="a\tb"),
    "an empty part": lambda d: d["documents"][0].update(path="a//b"),
    "a dot": lambda d: d["documents"][0].update(path="./a"),
    "a path that ends in a slash": lambda d: d["documents"][0].update(path="a/"),
    "a path of nothing": lambda d: d["documents"][0].update(path=""),
    "files as an object": lambda d: d.update(files={}),
    "the source as a list": lambda d: d.update(source=[]),
}  # fmt: skip


@pytest.mark.parametrize("spoil", CAN.values(), ids=CAN.keys())
def test_schema_and_validate_refuse_alike(good: dict[str, Any], spoil: Callable[[dict[str, Any]], None]) -> None:
    spoil(good)
    assert validate(good)
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(good)


def test_every_kind_of_file_can_be_described() -> None:
    for kind in Kind:
        entry = FileEntry(
            path="x", kind=kind, size=1, unpacked_size=1, header_size=1, header_sha256=None, digest=None, tensors=()
        )
        document = to_document(Manifest(layout="in_place", files=(entry,)))
        assert parse(document).files == (entry,)


def test_a_tensors_defaults_are_left_out() -> None:
    plain = TensorEntry(
        name="a", dtype="U8", shape=(1,), offset=0, size=1, digest=None, logical_shape=(1,), source_name="a"
    )
    entry = FileEntry(
        path="x",
        kind=Kind.SHARD,
        size=1,
        unpacked_size=1,
        header_size=0,
        header_sha256=None,
        digest=None,
        tensors=(plain,),
    )
    document = to_document(Manifest(layout="in_place", files=(entry,)))
    assert document["files"][0]["tensors"][0].keys() == {"name", "dtype", "shape", "offset", "size"}
    assert document["source"] is None
    assert document["selection"] == {"layers": None, "experts": None}
