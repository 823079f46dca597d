"""Make the folders beside this file: checkpoints with one fault each. Run it after a change and commit what it wrote.

Everything is spelled out by hand, headers, digests and zstd frames included, so that no bug of the tools can hide in
the corpus that is to find it. `good_source` and `good_resharded` have no fault: they prove that the others fail for
the fault they are named after. cases.json says how each must end.

    python tests/manifests/bad/make.py
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"
NORM, HEAD = "model.norm.weight", "lm_head.weight"

Folder = dict[str, bytes]


def dump(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def shard(header: bytes | dict[str, Any], payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else dump(header)
    return struct.pack("<Q", len(text)) + text + payload


def entry(begin: Any, end: Any, *, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def good_source() -> Folder:
    """Two shards of one tensor each, their index and a config."""
    return {
        "config.json": b'{"model_type":"deepseek_v3","num_hidden_layers":1}',
        INDEX: dump({"metadata": {"total_size": 7}, "weight_map": {NORM: ONE, HEAD: TWO}}),
        ONE: shard({NORM: entry(0, 3)}, b"abc"),
        TWO: shard({HEAD: entry(0, 4)}, b"defg"),
    }


SOURCES: dict[str, Callable[[Folder], Any]] = {"good_source": lambda f: None}
"""Faults of a folder of two shards."""

FILES: dict[str, bytes] = {}
"""Faults of the only shard of a folder."""


def source(**faults: Callable[[Folder], Any]) -> None:
    SOURCES.update(faults)


def single(**faults: bytes) -> None:
    FILES.update(faults)


def weights(**changes: Any) -> Callable[[Folder], Any]:
    """Another place for the head in the index."""
    return lambda f: f.update({INDEX: dump({"weight_map": {NORM: ONE, HEAD: TWO} | changes})})


def head_at(place: Any) -> Callable[[Folder], Any]:
    return weights(**{HEAD: place})


def raw(**fields: str) -> bytes:
    """A header with fields that no JSON writer would write."""
    parts = {"dtype": '"U8"', "shape": "[4]", "data_offsets": "[0,4]"} | fields
    return ('{"lm_head.weight":{' + ",".join(f'"{key}":{value}' for key, value in parts.items()) + "}}").encode()


source(
    missing_shard=lambda f: f.pop(TWO),
    missing_index=lambda f: f.pop(INDEX),
    missing_everything=lambda f: [f.pop(name) for name in (ONE, TWO, INDEX)],
    index_names_a_ghost=weights(ghost=TWO),
    index_forgets_a_tensor=lambda f: f.update({
        INDEX: dump({"weight_map": {NORM: ONE, HEAD: TWO}}),
        TWO: shard({HEAD: entry(0, 4), "forgotten": entry(4, 6)}, b"defghi"),
    }),
    index_names_the_wrong_shard=head_at(ONE),
    tensor_in_two_shards=lambda f: f.update({TWO: shard({HEAD: entry(0, 4), NORM: entry(4, 7)}, b"defgabc")}),
    index_not_json=lambda f: f.update({INDEX: b"{"}),
    index_not_utf8=lambda f: f.update({INDEX: f[INDEX].replace(b"norm", b"n\xffrm")}),
    index_duplicate_keys=lambda f: f.update({INDEX: b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'}),
    index_without_weight_map=lambda f: f.update({INDEX: b'{"metadata":{}}'}),
    index_weight_map_empty=lambda f: f.update({INDEX: b'{"weight_map":{}}'}),
    index_weight_map_list=lambda f: f.update({INDEX: b'{"weight_map":["x.safetensors"]}'}),
    index_place_is_a_number=head_at(7),
    index_place_is_a_list=head_at([TWO]),
    index_place_is_dotdot=head_at("../secret.safetensors"),
    index_place_is_dotdot_inside=head_at("sub/../../secret.safetensors"),
    index_place_is_absolute=head_at("/etc/secret.safetensors"),
    index_place_is_a_drive=head_at("C:secret.safetensors"),
    index_place_is_a_drive_path=head_at("C:/secret.safetensors"),
    index_place_has_backslashes=head_at("..\\secret.safetensors"),
    index_place_is_a_share=head_at("//server/share/secret.safetensors"),
    index_place_has_a_control_character=head_at("a\x1b[2J.safetensors"),
    index_place_is_no_safetensors=head_at("config.json"),
    index_place_is_empty=head_at(""),
    index_place_is_too_long=head_at("x" * 300 + ".safetensors"),
    index_place_has_a_superscript_digit=head_at("\u00b2.safetensors"),
    config_is_a_list=lambda f: f.update({"config.json": b"[]"}),
    config_duplicate_keys=lambda f: f.update({"config.json": b'{"num_hidden_layers":1,"num_hidden_layers":2}'}),
    config_has_nan=lambda f: f.update({"config.json": b'{"rope_theta":NaN}'}),
    config_has_infinity=lambda f: f.update({"config.json": b'{"rope_theta":1e999}'}),
    config_nested_without_end=lambda f: f.update({"config.json": b"[" * 4000}),
    auxiliary_in_our_folder=lambda f: f.update({"layers/notes.txt": b"mine"}),
    auxiliary_called_like_our_folder=lambda f: f.update({"model": b"mine"}),
    already_resharded=lambda f: f.update({"manifest.json": b"{}"}),
)  # fmt: skip


GOOD_SHARD = shard({HEAD: entry(0, 4)}, b"defg")

single(
    shard_empty=b"",
    shard_of_seven_bytes=b"1234567",
    shard_truncated=GOOD_SHARD[:-1],
    shard_truncated_in_header=GOOD_SHARD[:40],
    shard_trailing_byte=GOOD_SHARD + b"!",
    shard_is_html=b"<!DOCTYPE html><html><body>Not Found</body></html>",
    shard_is_an_lfs_pointer=b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
    header_longer_than_the_file=struct.pack("<Q", 4000) + GOOD_SHARD[8:],
    header_over_100_mb=struct.pack("<Q", 100_000_001) + GOOD_SHARD[8:],
    header_of_2_to_the_64=b"\xff" * 8 + GOOD_SHARD[8:],
    header_empty=shard(b"", b"defg"),
    header_not_json=shard(b'{"lm_head.weight":}', b"defg"),
    header_not_utf8=shard(b'{"lm_\xff":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"defg"),
    header_is_a_list=shard(b"[]", b"defg"),
    header_starts_with_a_blank=shard(b" " + raw(), b"defg"),
    header_has_half_a_surrogate=shard(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"defg"),
    header_metadata_not_text=shard(b'{"__metadata__":{"n":1},' + raw()[1:], b"defg"),
    header_entry_is_null=shard({HEAD: None}, b"defg"),
    header_entry_without_shape=shard({HEAD: {"dtype": "U8", "data_offsets": [0, 4]}}, b"defg"),
    header_entry_with_more=shard(raw(strides="[1]"), b"defg"),
    duplicate_tensor=shard(raw()[:-1] + b"," + raw(data_offsets="[4,8]")[1:], b"defghijk"),
    duplicate_key_in_an_entry=shard(raw(dtype='"U8","dtype":"I8"'), b"defg"),
    offsets_overlap=shard({HEAD: entry(0, 4), "b": entry(2, 6)}, b"defghi"),
    offsets_leave_a_hole=shard({HEAD: entry(0, 2), "b": entry(3, 5)}, b"defgh"),
    offsets_start_late=shard({HEAD: entry(1, 5)}, b"defgh"),
    offsets_reversed=shard(raw(data_offsets="[4,0]"), b"defg"),
    offset_negative=shard(raw(data_offsets="[-4,0]"), b"defg"),
    offset_huge=shard(raw(data_offsets="[9223372036854775808,9223372036854775812]"), b"defg"),
    offset_float=shard(raw(data_offsets="[0,4.0]"), b"defg"),
    offset_bool=shard(raw(shape="[1]", data_offsets="[false,true]"), b"d"),
    offset_of_5000_digits=shard(raw(data_offsets="[0," + "9" * 5000 + "]"), b"defg"),
    shape_disagrees=shard(raw(shape="[5]"), b"defg"),
    shape_negative=shard(raw(shape="[-2,-2]"), b"defg"),
    shape_huge=shard(raw(shape="[4294967296,4294967296]", data_offsets="[0,0]")),
    shape_float=shard(raw(shape="[4.0]"), b"defg"),
    shape_bool=shard(raw(shape="[true]", data_offsets="[0,1]"), b"d"),
    shape_is_text=shard(raw(shape='"4"'), b"defg"),
    dtype_unknown=shard(raw(dtype='"F8_E9M9"'), b"defg"),
    dtype_is_null=shard(raw(dtype="null"), b"defg"),
    fp8_without_scale=shard(raw(dtype='"F8_E4M3"'), b"defg"),
)  # fmt: skip


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zstd(content: bytes) -> bytes:
    """A frame with the content's size, of at most 255 bytes, and one raw block."""
    return b"\x28\xb5\x2f\xfd\x20" + bytes([len(content)]) + struct.pack("<I", len(content) << 3 | 1)[:3] + content


def bomb(size: int) -> bytes:
    """A frame that promises size bytes and holds one block of 128 kB zeros."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + struct.pack("<I", 1 << 17 << 3 | 1 << 1 | 1)[:3] + b"\0"


def document(path: str, role: str, data: bytes, source_name: str | None = None) -> dict[str, Any]:
    known = {"path": path, "role": role, "size": len(data), "sha256": sha(data)}
    return known | ({"source_name": source_name} if source_name else {})


def resharded() -> tuple[Folder, dict[str, Any]]:
    """The files of a sound resharded checkpoint of one shard, and its manifest without its digest."""
    original = shard({HEAD: entry(0, 4)})
    config, index = b'{"model_type":"deepseek_v3"}', dump({"weight_map": {HEAD: "model/head.safetensors"}})
    files = {
        "config.json": config,
        INDEX: index,
        "model/head.safetensors": original + b"defg",
        "source/headers/1.zst": zstd(original),
    }
    saved = document("source/headers/1.zst", "source_header", files["source/headers/1.zst"], "model.safetensors")
    tensor = {"name": HEAD, "dtype": "U8", "shape": [4], "offset": len(original), "size": 4, "digest": sha(b"defg")}
    head = {
        "path": "model/head.safetensors",
        "kind": "head",
        "size": len(original) + 4,
        "header_size": len(original),
        "header_sha256": sha(original),
        "digest": sha(hashlib.sha256(original).digest() + hashlib.sha256(b"defg").digest()),
        "tensors": [tensor],
    }
    manifest = {
        "format": "expert-reshard-manifest",
        "version": 1,
        "layout": "resharded",
        "model": {"model_type": "deepseek_v3"},
        "selection": {"layers": None, "experts": None},
        "files": [head],
        "documents": [
            document("config.json", "auxiliary", config, "config.json"),
            document(INDEX, "index", index),
            saved | {"codec": "zstd", "content_size": len(original), "content_sha256": sha(original)},
        ],
        "source": {
            "kind": "safetensors",
            "shards": [
                {
                    "name": "model.safetensors",
                    "size": len(original) + 4,
                    "sha256": sha(original + b"defg"),
                    "header": "source/headers/1.zst",
                }
            ],
        },
    }
    return files, manifest


def seal(manifest: dict[str, Any]) -> bytes:
    """Canonical bytes with their own digest."""
    zeros = "0" * 64
    text = json.dumps(manifest | {"manifest_sha256": zeros}, sort_keys=True, separators=(",", ":")) + "\n"
    return text.replace(zeros, sha(text.encode())).encode()


def store(files: Folder, manifest: dict[str, Any], path: str, data: bytes, **more: Any) -> None:
    """Another document, with the digests that it then has."""
    files[path] = data
    for found in manifest["documents"]:
        if found["path"] == path:
            found.update({"size": len(data), "sha256": sha(data)} | more)


# Faults of the manifest, sealed again afterwards: what someone writes who knows the format.
FORGED: dict[str, Callable[[Folder, dict[str, Any]], Any]] = {
    "good_resharded": lambda f, m: None,
    "manifest_version_2": lambda f, m: m.update(version=2),
    "manifest_version_float": lambda f, m: m.update(version=1.0),
    "manifest_other_format": lambda f, m: m.update(format="gguf"),
    "manifest_unknown_key": lambda f, m: m.update(created="yesterday"),
    "manifest_missing_key": lambda f, m: m["files"][0].pop("digest"),
    "manifest_null_digest": lambda f, m: m["files"][0]["tensors"][0].update(digest=None),
    "manifest_negative_size": lambda f, m: m["files"][0].update(size=-1),
    "manifest_huge_size": lambda f, m: m["files"][0].update(size=1 << 80),
    "manifest_float_offset": lambda f, m: m["files"][0]["tensors"][0].update(offset=8.0),
    "manifest_bool_layer": lambda f, m: m["files"][0].update(layer=True),
    "manifest_unknown_dtype": lambda f, m: m["files"][0]["tensors"][0].update(dtype="F8_E9M9"),
    "manifest_path_dotdot": lambda f, m: m["documents"][0].update(path="../config.json"),
    "manifest_path_absolute": lambda f, m: m["documents"][0].update(path="/etc/passwd"),
    "manifest_restores_outside": lambda f, m: m["documents"][0].update(source_name="../../.bashrc"),
    "manifest_shard_outside": lambda f, m: m["source"]["shards"][0].update(name="/tmp/x.safetensors"),
    "manifest_restores_over_a_shard": lambda f, m: m["documents"][0].update(source_name="model.safetensors"),
    "manifest_file_of_another_name": lambda f, m: m["files"][0].update(path="model/embed.safetensors"),
    "manifest_offset_outside": lambda f, m: m["files"][0]["tensors"][0].update(offset=1 << 40),
    "manifest_tensor_twice": lambda f, m: m["files"][0]["tensors"].append(m["files"][0]["tensors"][0]),
    "manifest_header_of_a_terabyte": lambda f, m: m["files"][0].update(header_size=1 << 40, size=(1 << 40) + 4),
    "manifest_no_saved_header": lambda f, m: m["documents"].pop(2),
    "file_missing": lambda f, m: f.pop("model/head.safetensors"),
    "file_truncated": lambda f, m: f.update({"model/head.safetensors": f["model/head.safetensors"][:-1]}),
    "file_payload_damaged": lambda f, m: f.update({"model/head.safetensors": f["model/head.safetensors"][:-1] + b"h"}),
    "file_header_damaged": lambda f, m: f.update({
        "model/head.safetensors": f["model/head.safetensors"].replace(b"[4]", b"[5]")}),
    "auxiliary_damaged": lambda f, m: f.update({"config.json": f["config.json"].replace(b"v3", b"v2")}),
    "saved_header_damaged": lambda f, m: f.update({"source/headers/1.zst": f["source/headers/1.zst"][:-1] + b"?"}),
    "saved_header_no_zstd": lambda f, m: store(f, m, "source/headers/1.zst", b"x" * 90),
    "saved_header_of_a_terabyte": lambda f, m: store(f, m, "source/headers/1.zst", bomb(1 << 40), content_size=1 << 40),
    "saved_header_longer_than_promised": lambda f, m: m["documents"][2].update(content_size=12),
    "saved_header_no_header": lambda f, m: store(
        f, m, "source/headers/1.zst", zstd(b"y" * 90), content_size=90, content_sha256=sha(b"y" * 90)),
    "saved_header_of_other_tensors": lambda f, m: store(
        f, m, "source/headers/1.zst", zstd(shard({"x": entry(0, 4)})), content_size=len(shard({"x": entry(0, 4)})),
        content_sha256=sha(shard({"x": entry(0, 4)}))) or m["source"]["shards"][0].update(
        size=len(shard({"x": entry(0, 4)})) + 4),
    "shard_digest_forged": lambda f, m: m["source"]["shards"][0].update(sha256="1" * 64),
}  # fmt: skip

# Faults of the manifest's bytes.
BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "manifest_edited": lambda raw: raw.replace(b'"deepseek_v3"', b'"deepseek_v2"'),
    "manifest_cut": lambda raw: raw[:-20],
    "manifest_empty": lambda raw: b"",
    "manifest_not_utf8": lambda raw: raw.replace(b"deepseek", b"deeps\xff\xffk"),
    "manifest_duplicate_keys": lambda raw: raw.replace(b'"version":1', b'"version":1,"version":1'),
    "manifest_without_its_digest": lambda raw: raw.replace(b'"manifest_sha256"', b'"manifest_sha265"'),
    "manifest_nested_without_end": lambda raw: b'{"files":' * 4000,
}


def build(root: Path) -> None:
    """Write every case below root."""
    folders: dict[str, Folder] = {}
    for name, spoil in SOURCES.items():
        folders[name] = good_source()
        spoil(folders[name])
    for name, data in FILES.items():
        folders[name] = {"model.safetensors": data}
    for name, forge in FORGED.items():
        files, manifest = resharded()
        forge(files, manifest)
        # One that is refused needs no files beside it.
        folders[name] = {"manifest.json": seal(manifest)} | ({} if name.startswith("manifest_") else files)
    for name, damage in BROKEN.items():
        folders[name] = {"manifest.json": damage(seal(resharded()[1]))}
    for name, folder in folders.items():
        for path, data in folder.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_bytes(data)


if __name__ == "__main__":
    for old in HERE.iterdir():
        if old.is_dir() and old.name != "__pycache__":
            shutil.rmtree(old)
    build(HERE)
