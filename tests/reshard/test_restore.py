"""The way back is byte for byte, is proven before anything is deleted, and never hides damage."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests.errors import IncompleteError, IntegrityError, ManifestError, SourceNotFoundError, ToolkitError
from manifests.schema import Selection
from reshard import restore as restore_module
from reshard.progress import Progress
from reshard.restore import RestoredShard, check, restore

Tree = Callable[[Path], dict[str, str]]
Stamps = Callable[[Path], dict[str, tuple[int, int, int]]]
Program = Callable[..., Any]

LEFT_OUT = {
    ".cache", ".cache/huggingface", ".cache/huggingface/download", ".cache/huggingface/download/config.json.metadata",
    "figures/.git", "figures/.git/HEAD", "pytorch_model.bin", "consolidated.safetensors",
}  # fmt: skip


def rebuild(root: Path, out: Path, jobs: int = 2) -> list[RestoredShard]:
    with Progress(0, label="", quiet=True) as progress:
        return restore(manifests.open(root), out, jobs=jobs, progress=progress)


def prove(root: Path, jobs: int = 2) -> list[RestoredShard]:
    with Progress(0, label="", quiet=True) as progress:
        return check(manifests.open(root), jobs=jobs, progress=progress)


@pytest.mark.parametrize("name", ["v3_folder", "v2_folder", "single_folder", "kimi_folder"])
@pytest.mark.parametrize("jobs", [1, 4])
def test_there_and_back(
    name: str,
    jobs: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    reshard_folder: Callable[..., Path],
    tree: Tree,
) -> None:
    if name == "kimi_folder" and jobs == 1:
        return  # one way through its 244 files is enough
    source: Path = request.getfixturevalue(name)
    out = reshard_folder(source, tmp_path / "out", jobs=jobs)
    proven = prove(out, jobs)
    assert rebuild(out, tmp_path / "back", jobs) == proven
    assert tree(tmp_path / "back") == original(tree, source)
    for shard in proven:
        raw = (source / shard.name).read_bytes()
        assert (shard.size, shard.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert len(proven) == len([path for path in source.rglob("*.safetensors") if path.name not in LEFT_OUT])


def test_the_source_is_not_needed(
    v3_copy: Path, tmp_path: Path, reshard_folder: Callable[..., Path], tree: Tree
) -> None:
    expected = tree(v3_copy)
    out = reshard_folder(v3_copy, tmp_path / "out")
    shutil.rmtree(v3_copy)
    moved = out.rename(tmp_path / "moved")
    rebuild(moved, tmp_path / "back")
    assert tree(tmp_path / "back") == {path: what for path, what in expected.items() if path not in LEFT_OUT}


def test_checking_writes_nothing(v3_resharded: Path, stamps: Stamps, tmp_path: Path) -> None:
    before, above = stamps(v3_resharded), sorted(os.listdir(v3_resharded.parent))
    prove(v3_resharded)
    assert stamps(v3_resharded) == before
    assert sorted(os.listdir(v3_resharded.parent)) == above
    assert os.listdir(tmp_path) == []


def test_odd_shards_come_back(
    tmp_path: Path, write_shards: Callable[..., Path], random_tensor: Callable[..., Any], tree: Tree,
    reshard_folder: Callable[..., Path],
) -> None:  # fmt: skip
    """Headers of a form that we would never write: blanks, escapes, another order, metadata, an empty shard."""
    source = write_shards(
        tmp_path / "source", [[random_tensor("lm_head.weight", "BF16", 3)], [random_tensor("s", "U8")]]
    )
    name = "model-00001-of-000002.safetensors"
    text = b'{ "__metadata__" : {"\\u0066ormat":"p\\u0074"},\n '
    text += b'"\\u006cm_head.weight":{"data_offsets":[0,6],"shape":[3],"dtype":"BF16"} } \t\r\n'
    (source / name).write_bytes(len(text).to_bytes(8, "little") + text + b"abcdef")
    out = reshard_folder(source, tmp_path / "out")
    rebuild(out, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)


def original(tree: Tree, source: Path) -> dict[str, str]:
    """What a restore makes of a checkpoint."""
    return {path: what for path, what in tree(source).items() if path not in LEFT_OUT}


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 16
    path.write_bytes(raw)


DAMAGED: dict[str, tuple[str, int, type[ToolkitError], str]] = {
    "payload": ("layers/2/experts/07.safetensors", 5000, IntegrityError, r"sha256 .*/07\.safetensors: bytes "),
    "a scale": ("layers/2/experts/07.safetensors", -1, IntegrityError, r"sha256 .*/07\.safetensors: bytes "),
    "a saved header": ("source/headers/11.zst", 30, IntegrityError, "11.zst: its sha256 is not the one"),
    "the saved index": ("source/index.json.zst", 30, IntegrityError, "index.json.zst: its sha256 is not the one"),
    "an auxiliary file": ("tokenizer.json", 3, IntegrityError, "tokenizer.json: its bytes are not those"),
    "the manifest": ("manifest.json", 500, ManifestError, "manifest"),
}


@pytest.mark.parametrize(("path", "position", "error", "says"), DAMAGED.values(), ids=DAMAGED.keys())
def test_one_flipped_bit_is_found_and_what_it_spoils_is_not_restored(
    resharded_copy: Path, v3_folder: Path, tmp_path: Path, path: str, position: int, error: type[ToolkitError],
    says: str, tree: Tree, program: Program, undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    before = tree(tmp_path)
    flip(resharded_copy / path, position)
    with pytest.raises(error, match=says):
        prove(resharded_copy)
    with pytest.raises(error, match=says):
        rebuild(resharded_copy, tmp_path / "back")
    for arguments in (["--check"], [tmp_path / "back"]):
        result = program("reshard", "restore", resharded_copy, *arguments)
        assert (result.code, result.out, result.err.count("\n")) == (error.exit_code, "", 1)
    flip(resharded_copy / path, position)
    assert undone_or_continued(
        tmp_path / "back", before, lambda: rebuild(resharded_copy, tmp_path / "back"), original(tree, v3_folder)
    ) is path.startswith("layers")


@pytest.mark.parametrize("how", ["cut", "grown", "gone"])
@pytest.mark.parametrize("path", ["layers/2/experts/07.safetensors", "LICENSE", "source/headers/11.zst"])
def test_files_of_another_size(
    resharded_copy: Path, v3_folder: Path, v3_resharded: Path, tmp_path: Path, path: str, how: str, tree: Tree,
    undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    before = tree(tmp_path)
    target = resharded_copy / path
    if how == "gone":
        target.unlink()
    else:
        os.truncate(target, target.stat().st_size + (1 if how == "grown" else -1))
    if (path, how) == ("layers/2/experts/07.safetensors", "grown"):
        prove(resharded_copy)  # the source's bytes are all there; `check` and `verify` name the rest
        return
    for action in (lambda: prove(resharded_copy), lambda: rebuild(resharded_copy, tmp_path / "back")):
        with pytest.raises((IntegrityError, SourceNotFoundError)):
            action()
    shutil.copy(v3_resharded / path, target)
    assert undone_or_continued(
        tmp_path / "back", before, lambda: rebuild(resharded_copy, tmp_path / "back"), original(tree, v3_folder)
    ) is path.startswith("layers")


@pytest.mark.parametrize("selection", [Selection(layers=(1,)), Selection(experts=(0, 3)), Selection(layers=(0, 1, 2))])
def test_a_part_is_refused_and_says_what_is_absent(
    selection: Selection,
    v3_folder: Path,
    tmp_path: Path,
    reshard_folder: Callable[..., Path],
    program: Program,
    tree: Tree,
) -> None:
    out = reshard_folder(v3_folder, tmp_path / "part", selection)
    before = tree(tmp_path)
    with pytest.raises(IncompleteError):
        prove(out)
    for arguments in (["--check"], [tmp_path / "back"]):
        result = program("reshard", "restore", out, *arguments)
        assert (result.code, result.out, result.err.count("\n")) == (3, "", 1)
        present = {location.name for location in manifests.open(out).tensors()}
        absent = [location.name for location in manifests.open(v3_folder).tensors() if location.name not in present]
        assert f"{len(absent)} tensors of the source are not here (first '{absent[0]}')" in result.err
    assert tree(tmp_path) == before


def test_a_selection_that_left_nothing_out_is_restored(
    v3_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path]
) -> None:
    out = reshard_folder(v3_folder, tmp_path / "all", Selection(experts=tuple(range(11))))
    assert len(prove(out)) == len(list(v3_folder.glob("model-*.safetensors")))


@pytest.mark.parametrize("name", ["preadv", "pwrite", "fsync", "rename"])
@pytest.mark.parametrize("number", [1, 20])
def test_a_disk_that_fails_leaves_nothing_or_what_can_be_gone_on_from(
    name: str, number: int, v3_resharded: Path, v3_folder: Path, tmp_path: Path, program: Program,
    fail_call: Callable[..., Any], tree: Tree, undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    code = errno.ENOSPC if name == "pwrite" else errno.EIO
    fail_call(name, number, code)
    result = program("reshard", "restore", v3_resharded, tmp_path / "new" / "back")
    assert (result.code, result.out) == (15 if name == "pwrite" else 1, "")
    assert result.err.count("\n") == 1
    out = tmp_path / "new" / "back"
    undone_or_continued(out, {}, lambda: program("reshard", "restore", v3_resharded, out), original(tree, v3_folder))


def test_an_interrupt_leaves_nothing_or_what_can_be_gone_on_from(
    v3_resharded: Path, v3_folder: Path, tmp_path: Path, stop_in_mid_run: Callable[..., tuple[int, str]],
    program: Program, tree: Tree, undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    out = tmp_path / "back"
    for arguments in (["--check"], [out]):
        assert not out.exists()
        code, err = stop_in_mid_run(["restore", v3_resharded, *arguments], signal.SIGINT)
        assert (code, err.splitlines()[-1], err.count("\n")) == (130, "reshard: interrupted", 3 if out.exists() else 2)
    undone_or_continued(out, {}, lambda: program("reshard", "restore", v3_resharded, out), original(tree, v3_folder))


def test_a_folder_that_could_not_be_written_is_forgotten_by_no_worker(
    v2_resharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it only to the first who asks; the others must not record what is in it."""
    real, asked = restore_module.sync_folders, []

    def sync(folder: Path) -> None:
        asked.append(folder)
        if len(asked) == 2:  # the first is that of the small files
            time.sleep(0.3)  # the others are done meanwhile
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        real(folder)

    monkeypatch.setattr(restore_module, "sync_folders", sync)
    with pytest.raises(ToolkitError, match="Input/output error"):
        rebuild(v2_resharded, tmp_path / "out", jobs=4)
    assert len(asked) == 2


def test_where_not_to_restore_to(resharded_copy: Path, tmp_path: Path, program: Program, tree: Tree) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    before = tree(tmp_path)
    for out in (resharded_copy, resharded_copy / "back", tmp_path, tmp_path / "full", resharded_copy / "config.json"):
        result = program("reshard", "restore", resharded_copy, out)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert tree(tmp_path) == before


def test_too_little_room(v3_resharded: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs
    monkeypatch.setattr(
        os, "statvfs", lambda path: os.statvfs_result([1, 1, *list(real(path))[2:4], 1000, *list(real(path))[5:]])
    )
    result = program("reshard", "restore", v3_resharded, tmp_path / "back")
    assert result.code == 15
    assert "the disk has 1,000 free" in result.err
    assert os.listdir(tmp_path) == []
    assert program("reshard", "restore", v3_resharded, "--check").code == 0


def test_what_is_no_resharded_checkpoint(v3_folder: Path, tmp_path: Path) -> None:
    for action in (lambda: prove(v3_folder), lambda: rebuild(v3_folder, tmp_path / "back")):
        with pytest.raises(ManifestError, match="not a resharded checkpoint"):
            action()


def test_an_auxiliary_file_is_never_in_memory_as_a_whole(
    v3_copy: Path, tmp_path: Path, reshard_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = reshard_folder(v3_copy, tmp_path / "out")
    read_bytes = Path.read_bytes

    def watched(path: Path) -> bytes:
        assert path.suffix in (".zst", ".json"), path
        assert path.name != "tokenizer.json"
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", watched)
    prove(out)
    rebuild(out, tmp_path / "back")


def test_a_forged_manifest_cannot_send_files_elsewhere(resharded_copy: Path, tmp_path: Path) -> None:
    """Even one that is sealed with the right digest of itself."""
    path = resharded_copy / "manifest.json"
    for evil in ("../evil", "/tmp/evil", "C:\\evil", "a/../../evil"):
        document = json.loads(path.read_bytes())
        document["documents"][0]["source_name"] = evil
        document["manifest_sha256"] = "0" * 64
        text = json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
        (tmp_path / "forged").mkdir(exist_ok=True)
        (tmp_path / "forged" / "manifest.json").write_text(
            text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest())
        )
        with pytest.raises(ManifestError, match="path"):
            manifests.open(tmp_path / "forged")
