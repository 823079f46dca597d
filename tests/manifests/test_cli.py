"""The inspection tool: what it prints, what `--json` promises, how it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import manifests as package
from manifests.console import format_bytes

Program = Callable[..., Any]


def keys(document: Any) -> Any:
    """The shape of a JSON document: keys of objects, the first element of lists."""
    if isinstance(document, dict):
        return {key: keys(value) for key, value in document.items()}
    if isinstance(document, list):
        return [keys(document[0])] if document else []
    return type(document).__name__


LAYER = {
    "layer": "int", "tensors": "int", "bytes": "int", "experts": "int", "expert_bytes": "int", "is_mtp": "bool",
}  # fmt: skip

ROLES = (
    "attention", "dense_mlp", "embedding", "final_norm", "lm_head", "mtp", "mtp_embedding", "mtp_head", "norm",
    "routed_expert", "router", "shared_expert", "unknown",
)  # fmt: skip

SHOW = {
    "layout": "str", "model_type": "str", "files": "int", "file_bytes": "int", "packed_files": "int",
    "packed_bytes": "int", "unpacked_bytes": "int", "tensors": "int", "tensor_bytes": "int",
    "parameters": {
        "main": "int", "mtp": "int", "mtp_copies": "int", "routed": "int", "activated": "int", "routed_share": "float",
    },
    "bytes_by_role": dict.fromkeys(ROLES, "int"),
    "bytes_by_dtype": {"F8_E4M3": "int", "BF16": "int", "F32": "int", "F64": "int", "U8": "int"},
    "tensors_by_dtype": {"F8_E4M3": "int", "BF16": "int", "F32": "int", "F64": "int", "U8": "int"},
    "layers": [LAYER], "unknown": ["str"], "partial": "bool", "path": "str", "missing_scales": [],
}  # fmt: skip


def test_show_json_keeps_its_keys(program: Program, v3_resharded: Path, v3_folder: Path) -> None:
    for root in (v3_resharded, v3_folder):
        result = program("manifests", "show", root, "--json")
        assert (result.code, result.err) == (0, "")
        assert keys(result.json) == SHOW
        assert result.json["path"] == str(root)
        assert [layer["is_mtp"] for layer in result.json["layers"]] == [False, False, False, True]


def test_show_for_people(program: Program, v3_resharded: Path, v3_bytes: dict[str, bytes]) -> None:
    result = program("manifests", "show", v3_resharded)
    assert result.code == 0
    assert f"{v3_resharded}: deepseek_v3, resharded\n" in result.out
    total = sum(map(len, v3_bytes.values()))
    assert f"{len(v3_bytes):,}   {format_bytes(total)}" in result.out
    assert "11 experts of" in result.out
    assert "note: 3 names that no rule knows" in result.err
    assert "model.layers.1.self_attn.mystery.weight" in result.err


def test_show_names_the_file_that_was_asked_for(program: Program, single_folder: Path) -> None:
    path = single_folder / "model.safetensors"
    assert program("manifests", "show", path).out.startswith(f"{path}: unknown model type, original files, in place")
    assert program("manifests", "show", path, "--json").json["path"] == str(path)


def test_show_says_what_has_no_scales(program: Program, tmp_path: Path) -> None:
    header = b'{"lm_head.weight":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    result = program("manifests", "show", tmp_path / "x.safetensors")
    assert result.code == 0
    assert "note: 1 FP8 weight without scales: lm_head.weight" in result.err
    assert program("manifests", "show", tmp_path / "x.safetensors", "--json").json["missing_scales"] == [
        "lm_head.weight"
    ]


def test_ls_json_gives_every_byte(
    program: Program, v3_folder: Path, v3_resharded: Path, v3_bytes: dict[str, bytes]
) -> None:
    for root in (v3_folder, v3_resharded):
        rows = program("manifests", "ls", root, "--json").json
        assert keys(rows) == [
            {
                "name": "str",
                "dtype": "str",
                "shape": ["int"],
                "encoding": "str",
                "logical_shape": ["int"],
                "begin": "int",
                "end": "int",
                "file": "str",
                "place": "str",
                "codec": "str",
            }
        ]
        assert len(rows) == len(v3_bytes)
        for row in rows:
            with (root / row["file"]).open("rb") as file:
                file.seek(row["begin"])
                assert file.read(row["end"] - row["begin"]) == v3_bytes[row["name"]]


def test_ls_for_people(program: Program, v3_resharded: Path) -> None:
    result = program("manifests", "ls", v3_resharded, "--layer", 2, "--expert", 10)
    assert (result.code, result.err) == (0, "")
    lines = [line.split() for line in result.out.splitlines()]
    assert len(lines) == 6
    assert lines[0] == [
        "F8_E4M3", "40x136", "4096-9536", "layers/2/experts/10.safetensors",
        "model.layers.2.mlp.experts.10.gate_proj.weight",
    ]  # fmt: skip
    assert "scalar" in program("manifests", "ls", v3_resharded, "--match", "*.gain").out


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--layer", 0], 12 + 6 + 2), (["--layer", 9], 0), (["--expert", 3], 18), (["--layer", 3, "--expert", 0], 6),
        (["--match", "*.kv_b_proj.*"], 8), (["--match", "lm_head*"], 1), (["--match", "LM_HEAD*"], 0),
        (["--layer", 1, "--match", "*scale_inv"], 5 + 3 + 33), (["--match", ""], 0),
    ],
)  # fmt: skip
def test_ls_filters(program: Program, v3_folder: Path, options: list[Any], count: int) -> None:
    result = program("manifests", "ls", v3_folder, "--json", *options)
    assert (result.code, len(result.json)) == (0, count)
    assert len(program("manifests", "ls", v3_folder, *options).out.splitlines()) == count


def test_hostile_names_are_escaped(program: Program, tmp_path: Path) -> None:
    name = "model.layers.1.\x1b[31m\u202e\r"
    header = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for command in ("ls", "show"):
        result = program("manifests", command, tmp_path / "x.safetensors")
        assert result.code == 0
        assert not {"\x1b", "\u202e", "\r"} & set(result.out + result.err)
    assert program("manifests", "ls", tmp_path / "x.safetensors", "--json").json[0]["name"] == name


def test_check(program: Program, v3_resharded: Path, resharded_copy: Path, v3_folder: Path) -> None:
    result = program("manifests", "check", v3_resharded, "--json")
    assert (result.code, result.json) == (0, {"path": str(v3_resharded), "ok": True, "problems": []})
    files = len([path for path in v3_resharded.rglob("*") if path.is_file()])
    assert (
        program("manifests", "check", v3_resharded).out
        == f"{v3_resharded}: {files - 1} files, sizes and headers are right\n"
    )
    assert program("manifests", "check", v3_folder).code == 0
    (resharded_copy / "config.json").unlink()
    result = program("manifests", "check", resharded_copy, "--json")
    assert result.code == 13
    assert keys(result.json) == {
        "path": "str",
        "ok": "bool",
        "problems": [{"loc": "str", "kind": "str", "message": "str"}],
    }
    assert result.json["ok"] is False


def test_check_lists_all_problems_of_a_manifest(program: Program, resharded_copy: Path) -> None:
    path = resharded_copy / "manifest.json"
    document = json.loads(path.read_bytes())
    document["files"][0]["size"] += 1
    document["files"][5]["kind"] = "router"
    path.write_text(json.dumps(document))
    result = program("manifests", "check", resharded_copy, "--json")
    assert result.code == 12
    assert {"files[0].size", "files[5].kind"} <= {problem["loc"] for problem in result.json["problems"]}
    result = program("manifests", "check", resharded_copy)
    assert (result.code, result.err) == (12, "")
    assert "files[0].size: " in result.out
    path.write_bytes(b"{")
    assert program("manifests", "check", resharded_copy).code == 12


def test_what_is_not_there(program: Program, tmp_path: Path) -> None:
    for command in ("show", "ls", "check"):
        result = program("manifests", command, tmp_path / "absent")
        assert (result.code, result.out) == (10, "")
        assert result.err == f"manifests: {tmp_path}/absent: no such file or folder\n"
        # Python 3.14 sees no file in such a name, earlier ones pass on what the system says.
        result = program("manifests", command, tmp_path / ("x" * 300))
        assert result.code in (1, 10)
        assert result.err.startswith("manifests: ")
        assert result.err.count("\n") == 1
    assert program("manifests", "diff", tmp_path, tmp_path).code == 10


def test_diff(program: Program, v3_resharded: Path, resharded_copy: Path, v3_folder: Path, v2_folder: Path) -> None:
    result = program("manifests", "diff", v3_resharded, resharded_copy, "--json")
    assert (result.code, result.json) == (0, {"equal": True, "undecided": 0, "differences": []})
    result = program("manifests", "diff", v3_resharded, resharded_copy)
    tensors = len(program("manifests", "ls", v3_resharded, "--json").json)
    assert (result.out, result.err) == ("", f"equal: {tensors} tensors\n")
    result = program("manifests", "diff", v3_folder, v3_resharded, "--json")
    assert (result.code, result.json["equal"]) == (3, None)  # who knows
    assert result.json["undecided"] > 200
    assert "no digests to compare" in result.err
    result = program("manifests", "diff", v3_folder, v2_folder, "--json")
    assert (result.code, result.json["equal"]) == (1, False)
    assert keys(result.json["differences"][0]).keys() == {"kind", "what", "name", "a", "b"}
    result = program("manifests", "diff", v3_folder, v2_folder)
    kinds = [
        difference["kind"]
        for difference in program("manifests", "diff", v3_folder, v2_folder, "--json").json["differences"]
    ]
    only = kinds.count("only_in_a"), kinds.count("only_in_b")
    assert result.err.splitlines()[0] == (
        f"different: {len(kinds) - sum(only)} tensors not equal, {only[0]} tensors only in the first, "
        f"{only[1]} tensors only in the second"
    )
    text = result.out
    assert "tensor model.layers.3.enorm.weight: only in the first\n" in text
    assert "shape [67, 136] against [30, 40]" in text


def test_a_missing_file_is_named_once(program: Program, resharded_copy: Path) -> None:
    path = next(resharded_copy.glob("layers/*/dense.safetensors"))
    path.unlink()
    result = program("manifests", "check", resharded_copy)
    assert (result.code, result.out) == (13, f"{path.relative_to(resharded_copy)}: no such file\n")


def test_schema(program: Program, v3_resharded: Path) -> None:
    result = program("manifests", "schema")
    assert result.code == 0
    jsonschema.validate(json.loads((v3_resharded / "manifest.json").read_bytes()), result.json)


@pytest.mark.parametrize("arguments", [["show"], ["ls", "x", "--layer", "three"], ["frobnicate"], ["show", "a", "b"]])
def test_usage(program: Program, arguments: list[str]) -> None:
    result = program("manifests", *arguments)
    assert (result.code, result.out) == (2, "")


def test_versions_and_help(program: Program) -> None:
    assert program("manifests", "--version").out.startswith("manifests, version ")
    for option in ("-h", "--help"):
        assert "Example:" in program("manifests", option).out


def test_the_package_offers_what_it_says(v3_resharded: Path, tmp_path: Path) -> None:
    assert all(hasattr(package, name) for name in package.__all__)
    package.save(package.load(v3_resharded), tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == (v3_resharded / "manifest.json").read_bytes()
    shutil.rmtree(tmp_path)
