"""A part is widened to more, up to everything; what was there stays whole and valid until the last moment."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests.errors import IncompleteError, ManifestError, ToolkitError
from manifests.schema import Selection
from reshard import run as run_module
from reshard.journal import Journal
from reshard.plan import SelectionError
from reshard.progress import Progress
from reshard.restore import restore
from reshard.verify import verify

Tree = Callable[[Path], dict[str, str]]
Stop = Callable[[int], AbstractContextManager[None]]
StopAt = Callable[[Any, str], AbstractContextManager[None]]
Reshard = Callable[..., Path]
FIRST = Selection(layers=(0,))


def damage_of(root: Path) -> list[Any]:
    with Progress(0, label="", quiet=True) as progress:
        return verify(manifests.open(root), jobs=1, progress=progress)


WAYS: dict[str, list[Selection]] = {
    "layer by layer": [Selection(layers=(layer,)) for layer in (1, 3, 0, 2)],
    "some layers and then all": [Selection(layers=(1, 2)), Selection()],
    "by experts": [Selection(experts=(3,)), Selection(experts=(0, 10)), Selection()],
    "both at once": [Selection(layers=(1,), experts=(2,)), Selection(layers=(1, 2), experts=(2, 3)), Selection()],
    "experts of a layer": [Selection(layers=(2,), experts=(1,)), Selection(layers=(2,), experts=(5,)), Selection()],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_step_by_step_is_as_good_as_at_once(
    way: list[Selection], v3_folder: Path, v3_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    out = tmp_path / "out"
    for selection in way:
        reshard_folder(v3_folder, out, selection)
        held = manifests.open(out).manifest.selection
        once = reshard_folder(v3_folder, tmp_path / "once", held)
        assert tree(out) == tree(once)
        shutil.rmtree(once)
    if way[-1] == Selection():
        assert tree(out) == tree(v3_resharded)
    else:
        # All layers by their numbers: the same bytes, another description.
        assert held == Selection(layers=(0, 1, 2, 3))
        with Progress(0, label="", quiet=True) as progress:
            restore(manifests.open(out), tmp_path / "back", jobs=2, progress=progress)
        assert (tmp_path / "back" / "config.json").exists()


@pytest.mark.parametrize("again", [FIRST, Selection(layers=(0,), experts=(1, 2)), Selection(experts=(0,), layers=(0,))])
def test_what_is_there_already_is_not_written_again(
    again: Selection, v2_folder: Path, tmp_path: Path, reshard_folder: Reshard, stamps: Callable[[Path], Any]
) -> None:
    out = reshard_folder(v2_folder, tmp_path / "out", FIRST)
    before = stamps(out)
    reshard_folder(v2_folder, out, again)
    assert stamps(out) == before


def test_a_narrower_plan_takes_nothing_away(
    v2_folder: Path, v2_resharded: Path, tmp_path: Path, plan_of: Any, run_planned: Any, tree: Tree
) -> None:
    """Also when who planned it did not look at the destination."""
    out = shutil.copytree(v2_resharded, tmp_path / "out")
    outcome = run_planned(*plan_of(v2_folder, FIRST), out)
    assert (outcome.moved_bytes, outcome.files) == (0, len(manifests.open(out).manifest.files))
    assert tree(out) == tree(v2_resharded)


def test_a_plan_that_leaves_out_what_is_there_is_refused(
    v3_folder: Path, tmp_path: Path, plan_of: Any, run_planned: Any, reshard_folder: Reshard, tree: Tree
) -> None:
    """Somebody widened it between the plan and the lock."""
    source, plan = plan_of(v3_folder, Selection(layers=(1,)))
    out = reshard_folder(v3_folder, tmp_path / "out", FIRST)
    before = tree(out)
    with pytest.raises(ToolkitError, match="was widened while this run was planned; run again"):
        run_planned(source, plan, out)
    assert tree(out) == before


def test_only_what_is_new_is_moved(v2_folder: Path, tmp_path: Path, plan_of: Any, run_planned: Any) -> None:
    out = tmp_path / "out"
    first = run_planned(*plan_of(v2_folder, FIRST), out)
    source, plan = plan_of(v2_folder)
    inodes = {file.path: (out / file.path).stat().st_ino for file in manifests.open(out).manifest.files}
    outcome = run_planned(source, plan, out)
    assert (first.kept_bytes, outcome.kept_bytes) == (0, first.moved_bytes)
    assert outcome.moved_bytes + outcome.kept_bytes == plan.payload_bytes
    assert {path: (out / path).stat().st_ino for path in inodes} == inodes


def test_what_is_there_is_valid_until_the_last_moment(
    v3_folder: Path, tmp_path: Path, reshard_folder: Reshard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every record the old manifest is what readers see, and every file of it is right."""
    out = reshard_folder(v3_folder, tmp_path / "out", Selection(layers=(0, 2)))
    held = manifests.load(out)
    append, seen = Journal.append, []

    def looking(self: Journal, record: dict[str, Any]) -> None:
        append(self, record)
        seen.append(record.get("shard"))
        assert manifests.open(out).manifest == held
        if len(seen) % 10 == 0:
            assert damage_of(out) == []

    monkeypatch.setattr(Journal, "append", looking)
    reshard_folder(v3_folder, out, Selection())
    assert len(seen) > 25
    assert manifests.open(out).manifest.selection.is_everything


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_a_widening_that_was_stopped_goes_on(
    shards: int, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, stop_after: Stop,
    tree: Tree,
) -> None:  # fmt: skip
    out = reshard_folder(v2_folder, tmp_path / "out", FIRST)
    held = manifests.load(out)
    with stop_after(shards):
        reshard_folder(v2_folder, out, jobs=1)
    assert manifests.open(out).manifest == held
    assert damage_of(out) == []
    with pytest.raises(ManifestError, match="a run with everything was interrupted here"):
        reshard_folder(v2_folder, out, Selection(layers=(0,), experts=(1,)), jobs=1)
    with stop_after(0):
        reshard_folder(v2_folder, out, jobs=1)
    assert tree(reshard_folder(v2_folder, out)) == tree(v2_resharded)


@pytest.mark.parametrize("where", ["write_kept", "write_index", "save", "end_journal"])
def test_a_widening_that_was_stopped_between_two_manifests(
    where: str,
    v2_folder: Path,
    v2_resharded: Path,
    tmp_path: Path,
    reshard_folder: Reshard,
    stop_at: StopAt,
    tree: Tree,
) -> None:
    out = reshard_folder(v2_folder, tmp_path / "out", FIRST)
    with stop_at(run_module, where):
        reshard_folder(v2_folder, out)
    if where == "write_kept":
        assert manifests.open(out).manifest.selection == FIRST
    elif where == "end_journal":
        assert manifests.open(out).manifest.selection == Selection()
    else:
        with pytest.raises(IncompleteError, match="goes on with it"):
            manifests.open(out)
    assert tree(reshard_folder(v2_folder, out)) == tree(v2_resharded)


def test_stopped_behind_the_last_step_and_then_widened_by_something_else(
    v3_folder: Path, tmp_path: Path, reshard_folder: Reshard, stop_at: StopAt, tree: Tree
) -> None:
    """What the finished run added is there, and stays."""
    out = reshard_folder(v3_folder, tmp_path / "out", FIRST)
    with stop_at(run_module, "end_journal"):
        reshard_folder(v3_folder, out, Selection(layers=(1,)))
    reshard_folder(v3_folder, out, Selection(layers=(2,)))
    once = reshard_folder(v3_folder, tmp_path / "once", Selection(layers=(0, 1, 2)))
    assert tree(out) == tree(once)


def test_a_disk_that_fails_takes_nothing_of_the_old(
    v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, fail_call: Any, tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for number in range(1, 25, 6):
        out = reshard_folder(v2_folder, tmp_path / f"out{number}", FIRST)
        held = manifests.load(out)
        fail_call("pwrite", number)
        with pytest.raises(ToolkitError):
            reshard_folder(v2_folder, out, jobs=1)
        monkeypatch.undo()
        if (out / "manifest.json").exists():
            assert manifests.open(out).manifest == held
            assert damage_of(out) == []
        assert tree(reshard_folder(v2_folder, out)) == tree(v2_resharded)


def test_what_is_no_product_of_layers_and_experts(
    v3_folder: Path, tmp_path: Path, reshard_folder: Reshard, program: Any, tree: Tree
) -> None:
    out = reshard_folder(v3_folder, tmp_path / "out", Selection(layers=(1,)))
    before = tree(tmp_path)
    with pytest.raises(SelectionError, match="not layers times experts: give a selection that covers both"):
        reshard_folder(v3_folder, out, Selection(experts=(0,)))
    result = program("reshard", "run", v3_folder, out, "--experts", "0")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert tree(tmp_path) == before


def change(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_another_model_with_the_same_headers_is_refused(
    v3_copy: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    """As V3 and R1 are to each other: names, shapes, sizes, files, all the same."""
    out = reshard_folder(v3_copy, tmp_path / "out", Selection(layers=(1,)))
    before = tree(out)
    location = manifests.open(v3_copy).find("model.layers.1.input_layernorm.weight")
    assert location is not None
    change(Path(location.place), location.offset)
    for selection in (None, Selection(layers=(2,)), Selection(layers=(1,))):
        with pytest.raises(
            ToolkitError,
            match=rf"holds another model than .*v3: {location.file} differs in tensor '{location.name}'; choose",
        ):
            reshard_folder(v3_copy, out, selection)
    assert tree(out) == before


def test_other_bytes_beyond_the_sample_are_refused_when_they_are_read_again(
    v2_copy: Path, tmp_path: Path, reshard_folder: Reshard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of which a part was taken is read whole for its sha256."""
    out = reshard_folder(v2_copy, tmp_path / "out", Selection(experts=(0,)))
    held = manifests.load(out)
    location = manifests.open(v2_copy).find("model.layers.1.mlp.experts.0.down_proj.weight")
    assert location is not None
    change(Path(location.place), location.offset)
    monkeypatch.setattr("reshard.earlier.SAMPLE_BYTES", 100)
    with pytest.raises(ManifestError, match=r"experts\.0\.down_proj\.weight' has other bytes than were taken before"):
        reshard_folder(v2_copy, out)
    assert manifests.open(out).manifest == held


def renamed(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another header of the same size": (
        renamed, r"holds another checkpoint than .*v2: model-00001-of-\d+\.safetensors is another file; choose",
    ),
    "another config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "deepseek_v2", "num_hidden_layers": 2}'),
        "config.json: differs from what .*out was made with",
    ),
    "another licence": (lambda folder: (folder / "LICENSE").write_text("x"), "LICENSE: differs from what"),
    "another index": (
        lambda folder: change_index(folder / "model.safetensors.index.json"), "index.json: differs from what",
    ),
}  # fmt: skip


def change_index(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("first", [FIRST, Selection()], ids=["part", "complete"])
@pytest.mark.parametrize(("make", "says"), OTHERS.values(), ids=OTHERS.keys())
def test_another_source_is_refused(
    make: Callable[[Path], Any],
    says: str,
    first: Selection,
    v2_copy: Path,
    tmp_path: Path,
    reshard_folder: Reshard,
    tree: Tree,
    program: Callable[..., Any],
) -> None:
    """Also when nothing is left to do: what is there would be taken for a copy of what is here."""
    out = reshard_folder(v2_copy, tmp_path / "out", first)
    before = tree(out)
    make(v2_copy)
    with pytest.raises(ToolkitError, match=says):
        reshard_folder(v2_copy, out)
    assert tree(out) == before
    for command in (("run", v2_copy, out), ("run", v2_copy, out, "--dry-run"), ("plan", v2_copy, out)):
        result = program("reshard", *command)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert re.search(says, result.err)


def test_quite_another_source_is_refused(
    v3_folder: Path, v2_folder: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    out = reshard_folder(v2_folder, tmp_path / "out", FIRST)
    before = tree(out)
    with pytest.raises(ToolkitError, match="holds another checkpoint than"):
        reshard_folder(v3_folder, out)
    assert tree(out) == before


def test_new_small_files_come_along(v2_copy: Path, tmp_path: Path, reshard_folder: Reshard) -> None:
    out = reshard_folder(v2_copy, tmp_path / "out", FIRST)
    (v2_copy / "README.md").write_text("new")
    reshard_folder(v2_copy, out)
    assert (out / "README.md").read_text() == "new"
    assert damage_of(out) == []


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_file_of_the_old_is_made_again(
    how: str, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    out = reshard_folder(v2_folder, tmp_path / "out", FIRST)
    path = out / "layers/0/dense.safetensors"
    if how == "cut":
        os.truncate(path, 5000)
    else:
        path.unlink()
    assert tree(reshard_folder(v2_folder, out)) == tree(v2_resharded)


def test_a_finished_checkpoint_that_is_damaged_is_not_said_to_be_there(
    v2_folder: Path, tmp_path: Path, program: Any
) -> None:
    """Sizes are looked at, and with --paranoid all bytes; `repair` mends it, and then it is."""
    out = tmp_path / "out"
    assert program("reshard", "run", v2_folder, out).code == 0
    expert, small = out / "layers/1/dense.safetensors", out / "generation_config.json"
    raw = expert.read_bytes()
    for change, said in (
        (expert.unlink, "no such file"),
        (lambda: expert.write_bytes(raw[:-1]), f"has {len(raw) - 1} bytes, the manifest says {len(raw)}"),
    ):
        change()
        for command in (["plan"], ["run"], ["run", "--paranoid"]):
            refused = program("reshard", *command, v2_folder, out)
            assert refused.code == 13
            assert f"{expert}: {said}; `reshard repair DST --from SRC` brings back" in refused.err
    expert.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert "was there already" in program("reshard", "run", v2_folder, out).out
    refused = program("reshard", "run", v2_folder, out, "--paranoid")
    assert (refused.code, f"{expert}: its bytes are damaged; `reshard repair" in refused.err) == (13, True)
    assert program("reshard", "repair", out, "--from", v2_folder).code == 0
    said = program("reshard", "run", v2_folder, out, "--discard")
    assert (said.code, said.err.count("is finished, so --discard removes nothing")) == (0, 1)
    assert program("reshard", "run", v2_folder, out, "--paranoid").code == 0
    small.unlink()
    assert f"{small}: no such file" in program("reshard", "run", v2_folder, out).err


@pytest.mark.parametrize("shards", [None, 0, 1, 2])
def test_a_widening_that_consumes(
    shards: int | None, v2_copy: Path, v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard,
    stop_after: Stop, tree: Tree,
) -> None:  # fmt: skip
    """Shards of which all was taken before are hashed as they lie here, and freed first."""
    out = reshard_folder(v2_copy, tmp_path / "out", FIRST)
    if shards is not None:
        with stop_after(shards):
            reshard_folder(v2_copy, out, jobs=1, consume=True)
        with pytest.raises(ToolkitError, match=r"are missing|--consume frees the whole source"):
            reshard_folder(v2_copy, tmp_path / "other", FIRST, consume=True)
    reshard_folder(v2_copy, out, consume=True)
    assert tree(out) == tree(v2_resharded)
    assert not list(v2_copy.glob("model-*.safetensors"))
    with Progress(0, label="", quiet=True) as progress:
        restore(manifests.open(out), tmp_path / "back", jobs=1, progress=progress)
    for path in v2_folder.glob("model-*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_a_widening_that_consumes_trusts_no_file(
    v2_copy: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Reshard, tree: Tree
) -> None:
    """A bit that flipped since would be the only copy: it is found, and taken from the shard again."""
    out = reshard_folder(v2_copy, tmp_path / "out", Selection(layers=(0,), experts=(0,)))
    change(out / "layers/0/dense.safetensors", 5000)
    reshard_folder(v2_copy, out, consume=True)
    assert tree(out) == tree(v2_resharded)
    assert not list(v2_copy.glob("model-*.safetensors"))
