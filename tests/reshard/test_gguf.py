"""GGUF files there and back: experts cut out without touching a byte, and the same files again, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import manifests
from manifests.errors import IntegrityError, ManifestError, SourceNotFoundError
from manifests.schema import Selection
from manifests.validate import parse
from reshard.journal import Journal
from reshard.progress import Progress
from reshard.repair import repair
from reshard.restore import check, restore
from reshard.source import read_source
from tests.gguf_files import CONFIG, write_gguf

Tree = Callable[[Path], dict[str, str]]
Reshard = Callable[..., Path]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """One file of the newer generation."""
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path)
    return path


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A folder with a split set of the older generation, and small files."""
    folder = tmp_path / "split"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", new=False, split_max_tensors=9)
    (folder / "README.md").write_text("a model", encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert len(list(folder.glob("*.gguf"))) > 3
    return folder


def back(root: Path, out: Path, **options: bool) -> Path:
    with Progress(0, label="", quiet=True) as progress:
        restore(manifests.open(root), out, jobs=2, progress=progress, **options)
    return out


def prove(root: Path) -> int:
    with Progress(0, label="", quiet=True) as progress:
        return len(check(manifests.open(root), jobs=2, progress=progress))


def test_one_file_there_and_back(one: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    out = reshard_folder(one, tmp_path / "out")
    assert prove(out) == 1
    restored = back(out, tmp_path / "back")
    assert [path.name for path in restored.iterdir()] == ["tiny.gguf"]
    assert (restored / "tiny.gguf").read_bytes() == one.read_bytes()


def test_a_split_set_there_and_back(split: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree) -> None:
    before = tree(split)
    out = reshard_folder(split, tmp_path / "out", jobs=3)
    assert prove(out) == len(list(split.glob("*.gguf")))
    restored = tree(back(out, tmp_path / "back"))
    # The config of the folder may be another form's, so it is not taken, and that is said.
    assert restored == {path: content for path, content in before.items() if path != "config.json"}
    assert read_source(split).left_out[0] == "config.json (the GGUF file says it itself)"
    assert tree(split) == before


def test_one_file_of_a_set_names_the_set(split: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    second = sorted(split.glob("*.gguf"))[1]
    out = reshard_folder(second, tmp_path / "out")
    assert [shard.name for shard in manifests.load(out).source.shards] == sorted(p.name for p in split.glob("*.gguf"))
    assert not (out / "README.md").exists()  # what else is in the folder may be another model's
    second.unlink()
    with pytest.raises(SourceNotFoundError, match=r"tiny-00002-of-0000.\.gguf: no such file"):
        read_source(second)
    with pytest.raises(SourceNotFoundError, match=r"1 of [0-9] files of a split model are missing"):
        read_source(split)


@pytest.mark.parametrize("new", [True, False], ids=["new", "old"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_every_expert_has_the_bytes_of_its_part(
    new: bool, fused: bool, tmp_path: Path, reshard_folder: Reshard
) -> None:
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    written = write_gguf(path, new=new, fused=fused)
    out = reshard_folder(path, tmp_path / "out")
    here, there = manifests.open(path), manifests.open(out)
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert parse(manifest, what="the manifest") == there.manifest
    assert manifest["source"]["kind"] == "gguf"
    found = {tensor.name: tensor for file in there.manifest.files for tensor in file.tensors}
    names = [location.name for location in here.tensors()]
    assert sorted(found) == sorted(names)
    parts: dict[str, bytes] = {}
    for location in here.tensors():
        mine = there.find(location.name)
        assert mine is not None
        assert (mine.dtype, mine.shape) == (location.dtype, location.shape)
        assert (mine.encoding, mine.logical_shape) == (location.encoding, location.logical_shape)
        bytes_here, bytes_there = here.tensor(location.name).data, there.tensor(location.name).data
        assert bytes_here == bytes_there
        source = found[location.name].source_name
        parts[source] = parts.get(source, b"") + bytes(bytes_there)
    assert parts == {name: content for name, (_, _, content) in written.items()}
    assert there.config == here.config
    assert there.manifest.model == here.manifest.model
    assert len(there.experts(1)) == CONFIG["n_routed_experts"]
    assert there.experts(0) == ()
    # Each is a safetensors file that other tools open.
    names = [file.path for file in there.manifest.files if file.expert == 3]
    assert names == ["layers/1/experts/3.safetensors", "layers/2/experts/3.safetensors"]


def test_other_tools_read_the_files(one: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    out = reshard_folder(one, tmp_path / "out")
    for file in manifests.load(out).files:
        with safe_open(out / file.path, framework="pt") as opened:
            assert sorted(opened.keys()) == sorted(tensor.name for tensor in file.tensors)


def test_padding_that_is_not_zero_comes_back(one: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    header = next(iter(read_source(one).shards.values()))
    assert sum(len(gap.content) for gap in header.gaps) > 20
    raw = bytearray(one.read_bytes())
    for number, gap in enumerate(header.gaps):
        begin = len(header.raw) + gap.begin
        raw[begin : begin + len(gap.content)] = bytes((number + at) % 255 + 1 for at in range(len(gap.content)))
    one.write_bytes(raw)
    out = reshard_folder(one, tmp_path / "out")
    assert prove(out) == 1
    assert (back(out, tmp_path / "back") / "tiny.gguf").read_bytes() == raw


def test_config_and_tokenizer_become_files(tmp_path: Path, reshard_folder: Reshard) -> None:
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path)
    out = reshard_folder(path, tmp_path / "out")
    assert json.loads((out / "config.json").read_bytes()) == manifests.open(path).config
    document = next(one for one in manifests.load(out).documents if one.path == "config.json")
    assert (document.role, document.source_name) == ("generated", None)
    assert read_source(path).left_out == (
        "the tokenizer (the GGUF metadata has a tokenizer without tokenizer.ggml.pre; convert the model again)",
    )


@pytest.mark.parametrize("damaged", ["config.json", "source/headers/1.zst", "layers/2/experts/4.safetensors"])
def test_repair_from_the_gguf_file(
    damaged: str, one: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    out = reshard_folder(one, tmp_path / "out")
    whole = tree(out)
    path = out / damaged
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    repair(out, one, jobs=1, progress=partial(Progress, quiet=True))
    assert tree(out) == whole


def test_a_part_and_then_the_rest(one: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree) -> None:
    out = reshard_folder(one, tmp_path / "out", Selection(layers=(1,), experts=(0, 2)))
    assert manifests.open(out).experts(1) == (0, 2)
    assert manifests.open(out).layers == (1,)
    reshard_folder(one, out, Selection())
    assert tree(out) == tree(reshard_folder(one, tmp_path / "at_once"))


@pytest.mark.parametrize("name", ["one", "split"])
def test_consumed_and_given_back(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    source: Path = request.getfixturevalue(name)
    folder = source if source.is_dir() else source.parent
    before = {path: content for path, content in tree(folder).items() if path != "config.json"}
    out = reshard_folder(source, tmp_path / "out", jobs=1, consume=True)
    assert not list(folder.glob("*.gguf"))
    assert tree(back(out, tmp_path / "back", consume=True)) == before
    assert not out.exists()


@pytest.mark.parametrize(("stop_behind", "is_first_back"), [(1, False), (2, False), (2, True)])
def test_a_consumed_set_goes_on_where_it_was_stopped(
    stop_behind: int,
    is_first_back: bool,
    split: Path,
    tmp_path: Path,
    reshard_folder: Reshard,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first file, which says what the model is, is gone by then."""
    whole = tree(reshard_folder(split, tmp_path / "at_once"))
    copy = shutil.copytree(split, tmp_path / "copy")
    real, calls = Journal.append, [0]

    def append(self: Journal, record: Any) -> None:
        calls[0] += 1
        if calls[0] > stop_behind:
            raise KeyboardInterrupt
        real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        with pytest.raises(KeyboardInterrupt):
            reshard_folder(copy, tmp_path / "out", jobs=1, consume=True)
    left = sorted(path.name for path in copy.glob("*.gguf"))
    assert len(left) == len(list(split.glob("*.gguf"))) - stop_behind
    if is_first_back:
        first = min(split.glob("*.gguf"))
        shutil.copy2(first, copy / first.name)
    reshard_folder(copy, tmp_path / "out", jobs=1, consume=True)
    assert tree(tmp_path / "out") == whole


def test_a_changed_byte_is_found(one: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    out = reshard_folder(one, tmp_path / "out")
    path = out / "layers/1/experts/1.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"layers/1/experts/1\.safetensors: bytes .* are damaged"):
        prove(out)


@pytest.mark.parametrize("cut", [3, 40, 4000, -1])
def test_a_truncated_file_leaves_nothing_behind(cut: int, one: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    one.write_bytes(one.read_bytes()[:cut])
    with pytest.raises(ManifestError, match=r"tiny\.gguf"):
        reshard_folder(one, tmp_path / "out")
    assert not (tmp_path / "out").exists()
