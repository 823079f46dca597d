"""Every single thing that can be wrong with a manifest is found, with its place."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from manifests.errors import ManifestError
from manifests.json_schema import json_schema
from manifests.validate import MAX_PROBLEMS, parse, validate


def places(value: Any, loc: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every value of a document with its place and the keys that lead there, each entry kind once."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        at = f"{loc}[{key}]" if isinstance(key, int) else f"{loc}.{key}".lstrip(".")
        yield at, [key]
        for deeper, keys in places(inner, at):
            yield deeper, [key, *keys]


def entry_of(loc: str) -> str:
    """The file, document, shard or part that a place belongs to: a contradiction may be reported at its other side."""
    match = re.match(r"files\[\d+\]|documents\[\d+\]|source\.shards\[\d+\]|\w+", loc)
    assert match
    return match[0]


def change(document: dict[str, Any], keys: list[Any], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    target: Any = changed
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    return changed


JUNK: list[Any] = [None, True, -1, 1.5, 1 << 80, "", "\0/..", "a/b", [], {}, [None], [0.5, "1"], 4097]

HARMLESS = [
    # What another honest manifest could say at this place. The manifest's own digest catches such a change.
    (r"manifest_sha256", "text"),
    (r"model", r"\{\}"),
    (r"model\.model_type", "\0/..|a/b"),
    (r"model\.(num_hidden_layers|n_routed_experts|num_experts_per_tok)", "4097"),
    (r"selection\.(layers|experts)", r"None|\[\]"),
    (r"selection\.layers\[0\]|selection\.experts\[1\]", "4097"),
    (r"files\[\d+\]\.tensors\[\d+\]\.(name|source_name|encoding)", "\0/..|a/b"),
    (r"files\[0\]\.tensors\[0\]\.logical_shape", r"\[\]"),
    (r"files\[0\]\.tensors\[0\]\.logical_shape\[\d\]", "4097"),
    (r"files\[0\]\.tensors\[1\]\.shape\[0\]", "never"),
    (r"files\[2\]\.size", "4097"),
    (r"files", r"\[\]"),
    (r"documents\[\d\]\.(size|content_size)", "4097"),
    (r"documents\[[01]\]\.path", "a/b"),
    (r"documents\[4\]\.path", "a/b"),
    (r"documents\[\d\]\.source_name", "a/b"),
    (r"source\.shards\[\d\]\.size", "4097"),
    (r"source\.shards\[\d\]\.name", "a/b"),
    (r"source\.shards\[\d\]\.sha256", "None"),
    (r"source\.shards", r"\[\]"),
]


def is_harmless(loc: str, value: Any, original: Any) -> bool:
    same = value == original and type(value) is type(original)
    return same or any(re.fullmatch(at, loc) and re.fullmatch(values, str(value)) for at, values in HARMLESS)


def test_a_good_document_has_no_problems(good: dict[str, Any]) -> None:
    assert validate(good) == []
    assert validate(good | {"manifest_sha256": "0" * 64}) == []


def test_every_wrong_value_is_found_at_its_place(good: dict[str, Any]) -> None:
    """Each value of the document by itself becomes each kind of nonsense, and the JSON Schema is never stricter."""
    schema = jsonschema.Draft202012Validator(json_schema())
    tried = 0
    for loc, keys in places(good):
        original: Any = good
        for key in keys:
            original = original[key]
        for junk in JUNK:
            document = change(good, keys, junk)
            problems = validate(document)
            harmless = is_harmless(loc, junk, original)
            assert bool(problems) is not harmless, f"{loc} = {junk!r}: {problems}"
            if harmless:
                assert schema.is_valid(document), f"{loc} = {junk!r}"
                continue
            tried += 1
            found = [problem.loc for problem in problems]
            # A saved header that is gone is missed where it is referred to.
            expected = ("source.shards",) if loc.startswith("documents") and junk in ("a/b", []) else ()
            assert any(at.startswith((entry_of(loc), *expected)) for at in found), f"{loc} = {junk!r}: {found}"
            if type(junk) in (type(None), bool, float, dict) and type(junk) is not type(original):
                # A value of the wrong type is named itself; an element of a list by its list.
                assert loc in found or loc.rpartition("[")[0] in found, f"{loc} = {junk!r}: {found}"
    assert tried > 1000


def test_every_missing_key_is_found(good: dict[str, Any]) -> None:
    optional = re.compile(
        r"model\.\w+|.*\.(encoding|logical_shape|source_name)|files\[\d\]\.(codec|stored_sha256|unpacked_size|layer|expert)"
        r"|.*\.chunks|documents\[\d\]\.(codec|content_size|content_sha256)"
    )
    silent = re.compile(r"model\.\w+|.*\.(encoding|logical_shape|source_name)")
    for loc, keys in places(good):
        if isinstance(keys[-1], int):
            continue
        document = copy.deepcopy(good)
        target: Any = document
        for key in keys[:-1]:
            target = target[key]
        del target[keys[-1]]
        problems = validate(document)
        if optional.fullmatch(loc):
            assert bool(problems) is not bool(silent.fullmatch(loc)), loc
            continue
        parent = loc.rpartition(".")[0]
        if loc in ("format", "version"):
            assert [problem.loc for problem in problems] == [loc]
            continue
        missing = [(p.loc, p.message) for p in problems if p.kind == "missing_key"]
        assert (parent, f"{keys[-1]!r} is missing") in missing, f"{loc}: {problems}"


def test_every_unknown_key_is_found(good: dict[str, Any]) -> None:
    objects = [("", [])] + [(loc, keys) for loc, keys in places(good)]
    for loc, keys in objects:
        document = copy.deepcopy(good)
        target: Any = document
        for key in keys:
            target = target[key]
        if isinstance(target, dict):
            target["Path"] = 1
            assert [(p.loc, p.kind) for p in validate(document)] == [(loc, "unknown_key")]


@pytest.mark.parametrize("document", [None, [], "x", 1, True, {}, {"format": "expert-reshard-manifest"}])
def test_what_is_no_manifest_at_all(document: Any) -> None:
    problems = validate(document)
    assert problems
    with pytest.raises(ManifestError) as caught:
        parse(document, what="x.json")
    assert caught.value.problems == tuple(problems)
    assert caught.value.exit_code == 12


@pytest.mark.parametrize("version", [0, 2, 1.0, True, "1", None, 10**30])
def test_a_version_that_is_not_known_is_all_that_is_said(good: dict[str, Any], version: Any) -> None:
    problems = validate(good | {"version": version, "files": "from the future", "new_key": 1})
    assert [problem.loc for problem in problems] == ["version"]
    assert "update" in problems[0].message


def file(d: Any, number: int) -> Any:
    return d["files"][number]


def tensor(d: Any, number: int, place: int) -> Any:
    return d["files"][number]["tensors"][place]


def document(d: Any, number: int) -> Any:
    return d["documents"][number]


def shard(d: Any, number: int) -> Any:
    return d["source"]["shards"][number]


CONTRADICTIONS = {
    "a hole between tensors": ("files[1].tensors[1].offset", lambda d: tensor(d, 1, 1).update(offset=16_785_412)),
    "an overlap": ("files[1].tensors[1].offset", lambda d: tensor(d, 1, 1).update(offset=16_785_404)),
    "a tensor before the payload": ("files[3].tensors[0].offset", lambda d: tensor(d, 3, 0).update(offset=4095)),
    "tensors in another order": ("files[1].tensors[0].offset", lambda d: file(d, 1)["tensors"].reverse()),
    "bytes behind the last tensor": ("files[3].size", lambda d: file(d, 3).update(size=4101)),
    "a file that is too short": ("files[3].size", lambda d: file(d, 3).update(size=4099)),
    "an unpacked size that is wrong": ("files[2].size", lambda d: file(d, 2).update(unpacked_size=4109)),
    "shape and size": ("files[3].tensors[0]", lambda d: tensor(d, 3, 0).update(shape=[1, 3])),
    "dtype and size": ("files[3].tensors[0]", lambda d: tensor(d, 3, 0).update(dtype="F32")),
    "another header digest": ("files[0].digest", lambda d: file(d, 0).update(header_sha256="0" * 64)),
    "another tensor digest": ("files[3].digest", lambda d: tensor(d, 3, 0).update(digest="0" * 64)),
    "another file digest": ("files[0].digest", lambda d: file(d, 0).update(digest="0" * 64)),
    "another chunk digest": ("files[1].tensors[0].digest", lambda d: tensor(d, 1, 0)["chunks"].reverse()),
    "too few chunks": ("files[1].tensors[0].chunks", lambda d: tensor(d, 1, 0)["chunks"].pop()),
    "chunks of a small tensor": ("files[3].tensors[0].chunks", lambda d: tensor(d, 3, 0).update(chunks=["0" * 64])),
    "a path that is another expert's": ("files[1].path", lambda d: file(d, 1).update(expert=6)),
    "a path that is another layer's": ("files[0].path", lambda d: file(d, 0).update(layer=4)),
    "a dense file that calls itself head": ("files[0].path", lambda d: file(d, 0).update(kind="head")),
    "a shard in a resharded folder": ("files[0].path", lambda d: file(d, 0).update(kind="shard")),
    "an expert without number": ("files[1].path", lambda d: file(d, 1).pop("expert")),
    "a compressed file not called so": (
        "files[2].path", lambda d: file(d, 2).update(path="layers/03/experts/008.safetensors")),
    "a plain file called compressed": (
        "files[0].path", lambda d: file(d, 0).update(path="layers/03/dense.safetensors.zst")),
    "a codec without its keys": ("files[0]", lambda d: file(d, 0).update(codec="zstd")),
    "its keys without a codec": ("files[2]", lambda d: file(d, 2).pop("codec")),
    "a document's codec without its keys": ("documents[1]", lambda d: document(d, 1).update(codec="zstd")),
    "two files of one path": ("files", lambda d: d["files"].append(file(d, 0))),
    "a document where a file is": ("files", lambda d: document(d, 0).update(path="model/head.safetensors")),
    "paths that differ in case alone": ("files", lambda d: document(d, 0).update(path="Model.safetensors.INDEX.json")),
    "two tensors of one name": ("files", lambda d: tensor(d, 0, 1).update(name="lm_head.weight")),
    "a selection out of order": ("selection.experts", lambda d: d["selection"]["experts"].reverse()),
    "a selection with repeats": ("selection.layers", lambda d: d["selection"].update(layers=[3, 3])),
    "no source": ("source", lambda d: d.update(source=None)),
    "two shards of one name": ("source", lambda d: shard(d, 1).update(name="MODEL-00001-of-000002.safetensors")),
    "a document that would be restored over a shard": (
        "source", lambda d: document(d, 0).update(source_name="model-00001-of-000002.safetensors")),
    "two documents that would be restored to one place": (
        "source", lambda d: document(d, 0).update(source_name="model.safetensors.index.json")),
    "a shard whose header is not kept": ("source.shards[0].header", lambda d: shard(d, 0).update(header="config.json")),
    "an unread shard of a whole model": (
        "source.shards[0].sha256", lambda d: d["selection"].update(layers=None, experts=None)),
}  # fmt: skip


@pytest.mark.parametrize(("loc", "spoil"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions(good: dict[str, Any], loc: str, spoil: Any) -> None:
    spoil(good)
    problems = validate(good)
    assert loc in [problem.loc for problem in problems], problems
    with pytest.raises(ManifestError, match=r"^manifest: "):
        parse(good)


def test_all_problems_are_reported_not_just_the_first(good: dict[str, Any]) -> None:
    good["files"][0]["size"] = "x"
    good["files"][3]["kind"] = "y"
    good["documents"][0]["sha256"] = "z"
    good["source"]["kind"] = None
    locs = {problem.loc for problem in validate(good)}
    assert {"files[0].size", "files[3].kind", "documents[0].sha256", "source.kind"} <= locs


def test_a_document_of_noise_does_not_fill_memory_with_complaints(good: dict[str, Any]) -> None:
    good["files"] = [{"path": 1}] * 50_000
    assert len(validate(good)) == MAX_PROBLEMS
    with pytest.raises(ManifestError, match="999 more problems"):
        parse(good)
    good["files"] = [{"x" * 10_000_000: 1}]
    assert max(len(problem.message) for problem in validate(good)) < 400


def test_in_place_needs_no_digests_but_sound_ranges(good: dict[str, Any]) -> None:
    tensors = [{"name": name, "dtype": "U8", "shape": [4], "offset": 10, "size": 4} for name in "ab"]
    tensors[1]["offset"] = 14
    shard = {"path": "a.safetensors", "kind": "shard", "size": 18, "header_size": 10, "tensors": tensors}
    document = good | {"layout": "in_place", "files": [shard], "documents": [], "source": None}
    assert validate(document) == []
    tensors[1]["offset"] = 13
    assert [problem.loc for problem in validate(document)] == ["files[0].tensors[1].offset"]
    tensors[1]["offset"] = 15
    assert [problem.loc for problem in validate(document)] == ["files[0].size"]


def test_the_document_is_left_alone_unless_it_is_given_away(good: dict[str, Any]) -> None:
    before = copy.deepcopy(good)
    manifest = parse(good)
    assert good == before
    assert parse(good, keep=False) == manifest
    assert good["files"] == [None] * len(before["files"])
    assert good["documents"] == [None] * len(before["documents"])
    before["files"][3]["size"] = 0
    expected = validate(before)
    with pytest.raises(ManifestError) as caught:
        parse(before, keep=False)
    assert caught.value.problems == tuple(expected)


def test_what_many_tensors_have_in_common_is_one_object(good: dict[str, Any]) -> None:
    dense = good["files"][0]["tensors"]
    for number, entry in enumerate(dense):
        entry |= {"dtype": "BF16", "shape": [1000, 1], "size": 2000, "offset": 4096 + 2000 * number}
        del entry["digest"]
    document = good | {
        "layout": "in_place",
        "files": [
            {"path": f"{name}.safetensors", "kind": "shard", "size": 8096, "header_size": 4096}
            | {"tensors": [entry | {"name": f"{name}.{entry['name']}"} for entry in copy.deepcopy(dense)]}
            for name in "ab"
        ],
        "documents": [],
        "source": None,
    }
    first, second = parse(json.loads(json.dumps(document))).files  # objects of their own, as a reader has them
    for one, other in zip(first.tensors, second.tensors, strict=True):
        assert one.name != other.name
        for key in ("dtype", "shape", "size", "offset"):
            assert getattr(one, key) is getattr(other, key), key


@pytest.mark.parametrize(
    "digest", ["0" * 63, "0" * 65, "0" * 64 + "\n", "A" * 64, "g" + "0" * 63, "\u0660" * 64, " " + "0" * 63, b"0" * 64]
)
def test_what_is_no_digest(good: dict[str, Any], digest: Any) -> None:
    good["documents"][0]["sha256"] = digest
    assert [(problem.loc, problem.kind) for problem in validate(good)] == [("documents[0].sha256", "invalid_value")]
