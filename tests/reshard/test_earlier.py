"""What an earlier command left: recognised for what it is, or refused by the name of what differs."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import manifests
from manifests.errors import IntegrityError, ManifestError, SourceNotFoundError, ToolkitError
from manifests.schema import Manifest, ModelFacts, Selection
from reshard import earlier as earlier_module
from reshard.earlier import Earlier, find_earlier
from reshard.plan import SelectionError

Tree = Callable[[Path], dict[str, str]]
Stop = Callable[[int], AbstractContextManager[None]]
Reshard = Callable[..., Path]
JOURNAL = "reshard-journal.jsonl"
FIRST = "model-00001-of-000004.safetensors"


def selected(selection: Selection) -> set[tuple[int | None, int | None]]:
    """What of a model of four layers with four experts each is taken; the last ones are never named."""
    cells = [(None, None), *itertools.product(range(4), [None, *range(4)])]
    return {cell for cell in cells if selection.includes(*cell)}


def holding(selection: Selection) -> Earlier:
    manifest = Manifest(
        layout="resharded", model=ModelFacts(), selection=selection, files=(), documents=(), source=None
    )
    return Earlier(manifest=manifest)


NUMBERS = st.one_of(st.none(), st.sets(st.integers(0, 2), min_size=1).map(sorted).map(tuple))
ALL = [None, *(numbers for count in (1, 2, 3) for numbers in itertools.combinations(range(3), count))]
SELECTIONS = st.builds(Selection, layers=NUMBERS, experts=NUMBERS)


@given(held=SELECTIONS, more=SELECTIONS)
def test_what_two_selections_are_together(held: Selection, more: Selection) -> None:
    """Layers times experts again, with no more and no less than both; or refused."""
    together = selected(held) | selected(more)
    try:
        union = holding(held).widen(more)
    except SelectionError:
        assert all(selected(Selection(layers=layers, experts=experts)) != together for layers in ALL for experts in ALL)
    else:
        assert selected(union) == together
        assert holding(more).widen(held) == union


def test_nothing_there_is_widened_by_anything() -> None:
    assert Earlier().widen(Selection(layers=(1,))) == Selection(layers=(1,))


def test_why_two_selections_are_none_together() -> None:
    says = r"holds --layers 1,2; together with --experts 0 that is not layers times experts: give a selection that"
    with pytest.raises(SelectionError, match=says):
        holding(Selection(layers=(1, 2))).widen(Selection(experts=(0,)))


def test_nothing_is_found_where_nothing_is(v2_folder: Path, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "new"):
        found = find_earlier(v2_folder, out)
        assert (found.journal, found.manifest, found.durable.tensors, found.freed) == (None, None, {}, {})
        assert not found.is_finished
        assert not found.consumes
    assert os.listdir(tmp_path) == []


def test_what_a_checkpoint_vouches_for(v2_folder: Path, v2_resharded: Path) -> None:
    found = find_earlier(v2_folder, v2_resharded)
    manifest = manifests.load(v2_resharded)
    assert found.manifest == manifest
    assert manifest.source is not None
    assert found.durable.shards == {shard.name: shard.sha256 for shard in manifest.source.shards}
    assert found.durable.tensors == {
        tensor.name: (tensor.digest,) for file in manifest.files for tensor in file.tensors
    }
    assert found.freed == {}


def test_a_run_that_was_stopped(v2_folder: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop) -> None:
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_folder, out, jobs=1)
    found = find_earlier(v2_folder, out)
    assert found.journal is not None
    assert found.manifest is None
    assert list(found.durable.shards) == sorted(path.name for path in v2_folder.glob("model-*.safetensors"))[:2]
    for name, sha256 in found.durable.shards.items():
        assert sha256 == hashlib.sha256((v2_folder / name).read_bytes()).hexdigest()
    assert not found.consumes
    assert find_earlier(v2_folder, out).freed == {}


def test_freed_shards_have_the_headers_that_they_had(
    v2_copy: Path, v2_folder: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, plan_of: Any
) -> None:
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_copy, out, jobs=1, consume=True)
    expected = plan_of(v2_folder)[0].shards
    names = list(expected)
    found = find_earlier(v2_copy, out)
    assert found.consumes
    assert found.freed == {name: expected[name] for name in names[:2]}
    # Put back by hand, it is one that is there.
    shutil.copy2(v2_folder / names[0], v2_copy / names[0])
    assert list(find_earlier(v2_copy, out).freed) == names[1:2]
    (v2_copy / names[3]).unlink()
    with pytest.raises(SourceNotFoundError, match=f"{names[3]}: is gone, and .* does not say that it was taken"):
        find_earlier(v2_copy, out)


def test_a_freed_shard_whose_saved_header_is_damaged(
    v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    out = tmp_path / "out"
    with stop_after(1):
        reshard_folder(v2_copy, out, jobs=1, consume=True)
    before = tree(tmp_path)
    saved = out / "source/headers/1.zst"
    right, other = saved.read_bytes(), (out / "source/headers/2.zst").read_bytes()
    for wrong in (right[:-1] + b"?", right[:-5], b"", other):
        saved.write_bytes(wrong)
        with pytest.raises(IntegrityError, match=r"1\.zst"):
            reshard_folder(v2_copy, out, consume=True)
    saved.write_bytes(right)
    assert tree(tmp_path) == before


def test_a_checkpoint_whose_source_is_used_up(v2_copy: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    out = reshard_folder(v2_copy, tmp_path / "out", consume=True)
    assert len(find_earlier(v2_copy, out).freed) == 4
    assert find_earlier(tmp_path / "nowhere", out).freed == {}


def test_a_manifest_that_is_known_is_not_read_twice(
    v2_folder: Path, v2_resharded: Path, v3_resharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = find_earlier(v2_folder, v2_resharded), find_earlier(v2_folder, v3_resharded)
    read = []
    monkeypatch.setattr(
        earlier_module, "decode", lambda raw, *, what: read.append(what) or manifests.storage.decode(raw, what=what)
    )
    assert find_earlier(v2_folder, v2_resharded, first) == first
    assert read == []
    assert find_earlier(v2_folder, v2_resharded, other) == first
    assert read == [str(v2_resharded / "manifest.json")]


def change_header(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))


def flip_last(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


OTHER_SOURCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other bytes": (flip_last, "is not the file that the interrupted run|was written anew"),
    "another size": (lambda path: os.truncate(path, path.stat().st_size + 1), "has .* bytes|is not the file"),
    "another header": (change_header, "is not the file that the interrupted run"),
    "gone": (lambda path: path.unlink(), "are missing, first"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), OTHER_SOURCES.values(), ids=OTHER_SOURCES.keys())
@pytest.mark.parametrize("number", [0, 3])
def test_another_source_is_refused_by_name(
    v2_copy: Path, tmp_path: Path, change: Callable[[Path], Any], says: str, number: int, reshard_folder: Reshard,
    stop_after: Stop, tree: Tree,
) -> None:  # fmt: skip
    """Whether the shard was taken already or not."""
    out = tmp_path / "out"
    with stop_after(1):
        reshard_folder(v2_copy, out, jobs=1)
    before = tree(out)
    name = sorted(path.name for path in v2_copy.glob("model-*.safetensors"))[number]
    change(v2_copy / name)
    with pytest.raises(ToolkitError, match=f"{name}.*{says}|{says}.*{name}"):
        reshard_folder(v2_copy, out)
    assert tree(out) == before


@pytest.mark.parametrize("consume", [False, True])
def test_another_time_stamp_is_no_other_source(
    consume: bool, v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree,
) -> None:  # fmt: skip
    """What was taken is compared; of the rest, nothing but the stamp tells that it is the same."""
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_copy, out, jobs=1)
    taken, _, *left = sorted(v2_copy.glob("model-*.safetensors"))
    before, time_ns = tree(out), left[0].stat().st_mtime_ns
    for path in (taken, *left):
        os.utime(path, ns=(1, 1))
    with pytest.raises(ManifestError, match=f"{left[0]} .and 1 more.: was written anew since") as caught:
        reshard_folder(v2_copy, out, consume=consume)
    assert tree(out) == before
    advice = re.search(r"`(touch -d .*)`", str(caught.value))
    assert advice is not None
    subprocess.run(shlex.split(advice[1]), check=True)
    assert left[0].stat().st_mtime_ns == time_ns
    with pytest.raises(ManifestError, match=f"{left[1]}: was written anew since") as caught:
        reshard_folder(v2_copy, out, consume=consume)
    advice = re.search(r"`(touch -d .*)`", str(caught.value))
    assert advice is not None
    subprocess.run(shlex.split(advice[1]), check=True)
    reshard_folder(v2_copy, out, consume=consume)
    assert tree(out) == tree(v2_resharded)


def restamp(folder: Path) -> None:
    for path in folder.glob("model-*.safetensors"):
        os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("consume", [False, True])
def test_a_copy_of_the_whole_source_is_known_by_what_was_taken_from_it(
    consume: bool, v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with stop_after(2):
        reshard_folder(v2_copy, out, jobs=1)
    restamp(v2_copy)
    before = tree(out)
    taken = min(v2_copy.glob("model-*.safetensors"))
    right = taken.read_bytes()
    flip_last(taken)
    os.utime(taken, ns=(1, 1))
    with pytest.raises(ManifestError, match=f"{taken}: is not the file that the interrupted run"):
        reshard_folder(v2_copy, out, consume=consume)
    assert tree(out) == before
    taken.write_bytes(right)
    os.utime(taken, ns=(1, 1))
    reshard_folder(v2_copy, out, consume=consume)
    assert tree(out) == tree(v2_resharded)


def test_a_copy_of_which_nothing_was_taken_is_not_known(
    v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop
) -> None:
    with stop_after(1):
        reshard_folder(v2_copy, tmp_path / "out", jobs=1, consume=True)
    restamp(v2_copy)
    with pytest.raises(ManifestError, match=r"and 2 more.: was written anew since") as caught:
        reshard_folder(v2_copy, tmp_path / "out", consume=True)
    assert "--discard" not in str(caught.value)  # it would be refused


def test_shards_that_are_not_needed_may_be_written_anew(
    v3_copy: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop, plan_of: Any
) -> None:
    selection = Selection(layers=(1,), experts=(0, 2))
    with stop_after(1):
        reshard_folder(v3_copy, tmp_path / "out", selection, jobs=1)
    plan = plan_of(v3_copy, selection)[1]
    needed = {tensor.shard for file in plan.files for tensor in file.tensors}
    unneeded = [path for path in v3_copy.glob("model-*.safetensors") if path.name not in needed]
    assert unneeded
    os.utime(unneeded[0], ns=(1, 1))
    reshard_folder(v3_copy, tmp_path / "out", selection)


def test_a_source_with_fewer_or_more_shards(
    tmp_path: Path, v2_folder: Path, v3_folder: Path, single_folder: Path, reshard_folder: Reshard, stop_after: Stop
) -> None:
    with stop_after(2):
        reshard_folder(v2_folder, tmp_path / "out", jobs=1)
    for other in (v3_folder, single_folder):
        with pytest.raises(ManifestError, match=r"is not the file that the interrupted run|has no model-"):
            reshard_folder(other, tmp_path / "out")


def test_another_selection_is_refused(
    tmp_path: Path, v2_folder: Path, reshard_folder: Reshard, stop_after: Stop, tree: Tree
) -> None:
    out = tmp_path / "out"
    with stop_after(1):
        reshard_folder(v2_folder, out, Selection(layers=(1,), experts=(0, 2)), jobs=1)
    before = tree(out)
    for other in (None, Selection(layers=(1,)), Selection(layers=(0, 1), experts=(0, 2))):
        with pytest.raises(ManifestError, match=r"a run with --experts 0,2 --layers 1 was interrupted here; give"):
            reshard_folder(v2_folder, out, other)
    assert tree(out) == before


SHARD = {"name": "a.safetensors", "size": 5, "mtime_ns": 1, "header_size": 5, "header_sha256": "0" * 64}
GOOD: dict[str, Any] = {
    "version": 1, "task": "run", "consume": True, "widens": None, "selection": {"layers": None, "experts": [1]},
    "shards": [SHARD],
}  # fmt: skip
BAD_BEGINS: list[dict[str, Any]] = [
    {"consume": 1}, {"consume": None}, {"widens": 5}, {"selection": None}, {"selection": {"layers": None}},
    {"selection": {"layers": 5, "experts": None}}, {"selection": {"layers": [True], "experts": None}},
    {"selection": {"layers": ["1"], "experts": None}}, {"shards": None}, {"shards": {}}, {"shards": [5]},
    *({"shards": [SHARD | change]} for change in (
        {"name": "../a"}, {"name": "/etc/passwd"}, {"name": 5}, {"size": "5"}, {"size": True}, {"mtime_ns": 1.5},
        {"header_size": None}, {"header_sha256": 5}, {"more": 1},
    )),
    {"shards": [{}]},
]  # fmt: skip
BAD_RECORDS: list[Any] = [
    {}, {"shard": 5, "sha256": None, "tensors": {}}, {"shard": "a", "sha256": 5, "tensors": {}},
    {"shard": "a", "sha256": "zz", "tensors": {}}, {"shard": "a", "sha256": None, "tensors": []},
    {"shard": "a", "sha256": None, "tensors": {"t": []}}, {"shard": "a", "sha256": None, "tensors": {"t": "0" * 64}},
    {"shard": "a", "sha256": None, "tensors": {"t": ["zz"]}}, {"shard": "a", "sha256": None, "tensors": {"t": [5]}},
    {"shard": "a", "sha256": None}, {"finished": True}, {"consume": 1.5},
]  # fmt: skip


def forge(folder: Path, *records: object) -> None:
    """A journal with right checks, whatever it says."""
    folder.mkdir()
    check, raw = "", b""
    for record in records:
        text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        check = hashlib.sha256(check.encode() + text).hexdigest()
        raw += b'{"check":"%s","record":%s}\n' % (check.encode(), text)
    (folder / JOURNAL).write_bytes(raw)


@pytest.mark.parametrize("begin", BAD_BEGINS, ids=str)
def test_a_first_record_that_this_program_never_wrote(tmp_path: Path, v2_folder: Path, begin: dict[str, Any]) -> None:
    forge(tmp_path / "out", GOOD | begin)
    with pytest.raises(ManifestError, match="it was not written by this program"):
        find_earlier(v2_folder, tmp_path / "out")


@pytest.mark.parametrize("record", BAD_RECORDS, ids=str)
def test_other_records_that_this_program_never_wrote(tmp_path: Path, v2_folder: Path, record: object) -> None:
    forge(tmp_path / "out", GOOD | {"consume": False}, record)
    with pytest.raises(ManifestError, match="it was not written by this program"):
        find_earlier(v2_folder, tmp_path / "out")


def test_a_missing_key_is_a_wrong_form_too(tmp_path: Path, v2_folder: Path) -> None:
    for number, key in enumerate(["consume", "selection", "shards"]):
        forge(tmp_path / str(number), {name: value for name, value in GOOD.items() if name != key})
        with pytest.raises(ManifestError, match="it was not written by this program"):
            find_earlier(v2_folder, tmp_path / str(number))


@pytest.mark.parametrize("task", ["restore", "pack", None, 5, ["run"]])
def test_the_journal_of_another_command(tmp_path: Path, v2_folder: Path, task: object, tree: Tree) -> None:
    forge(tmp_path / "out", GOOD | {"task": task})
    before = tree(tmp_path)
    with pytest.raises(ManifestError, match="was interrupted here; finish that first, or choose another folder"):
        find_earlier(v2_folder, tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_damaged_manifest_is_not_built_upon(resharded_copy: Path, v3_folder: Path, reshard_folder: Reshard) -> None:
    path = resharded_copy / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"layer":1', b'"layer":2', 1))
    with pytest.raises(ManifestError, match="manifest"):
        reshard_folder(v3_folder, resharded_copy)


def test_a_sample_of_the_source_is_small_tensors_first(
    v2_folder: Path, v2_resharded: Path, plan_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = plan_of(v2_folder)
    sizes: list[int] = []
    read = earlier_module.read_blocks
    monkeypatch.setattr(earlier_module, "SAMPLE_BYTES", 1000)
    monkeypatch.setattr(earlier_module, "read_blocks", lambda *asked: (sizes.append(asked[-1]), read(*asked))[1])
    earlier_module.require_same_source(find_earlier(v2_folder, v2_resharded), source, plan, v2_resharded)
    assert sizes == sorted(sizes)
    assert 0 < sum(sizes) <= 1000
