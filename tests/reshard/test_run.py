"""A whole reshard: what it leaves when it succeeds, and nothing or what it can go on from when it does not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors

import manifests
from manifests.errors import IncompleteError, ResourceError, ToolkitError
from manifests.schema import Selection
from reshard import run as run_module
from reshard.journal import Journal

Tree = Callable[[Path], dict[str, str]]
Program = Callable[..., Any]
INDEX = "model.safetensors.index.json"


def test_the_layout_of_format_md(v3_resharded: Path, v3_folder: Path, tree: Tree) -> None:
    found = {path for path, what in tree(v3_resharded).items() if what != "folder"}
    experts = {f"layers/{layer}/experts/{expert:02}.safetensors" for layer in (1, 2, 3) for expert in range(11)}
    dense = {f"layers/{layer}/dense.safetensors" for layer in range(4)}
    shards = len(list(v3_folder.glob("model-*.safetensors")))
    headers = {f"source/headers/{number:02}.zst" for number in range(1, shards + 1)}
    auxiliary = {
        ".gitattributes", "LICENSE", "config.json", "empty.txt", "figures/deep/benchmark 1.txt",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert found == experts | dense | headers | auxiliary | {
        "manifest.json", INDEX, "source/index.json.zst", "model/embed.safetensors", "model/head.safetensors",
        "model/dense.safetensors", "layers/3/embed.safetensors", "layers/3/head.safetensors",
    }  # fmt: skip
    for path in auxiliary:
        assert (v3_resharded / path).read_bytes() == (v3_folder / path).read_bytes()


def test_the_library_opens_every_file(v3_resharded: Path, v3_bytes: dict[str, bytes]) -> None:
    seen = {}
    for path in v3_resharded.rglob("*.safetensors"):
        raw = path.read_bytes()
        assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0
        seen |= {name: bytes(info["data"]) for name, info in safetensors.deserialize(raw)}
    assert seen == v3_bytes


def test_our_index_is_a_standard_one(v3_resharded: Path, v3_bytes: dict[str, bytes], tmp_path: Path) -> None:
    index = json.loads((v3_resharded / INDEX).read_bytes())
    assert index["metadata"]["total_size"] == sum(map(len, v3_bytes.values()))
    for name, file in index["weight_map"].items():
        assert name in [entry for entry, _ in safetensors.deserialize((v3_resharded / file).read_bytes())]
    assert index["weight_map"].keys() == v3_bytes.keys()
    # Without its manifest the folder is an ordinary checkpoint, also for us.
    plain = shutil.copytree(v3_resharded, tmp_path / "plain")
    (plain / "manifest.json").unlink()
    assert {location.name for location in manifests.open(plain).tensors()} == v3_bytes.keys()


def test_an_expert_by_its_numbers(v3_resharded: Path, v3_bytes: dict[str, bytes]) -> None:
    views = manifests.open(v3_resharded).expert(3, 10)
    assert {short: bytes(view.data) for short, view in views.items()} == {
        name.removeprefix("model.layers.3.mlp.experts.10."): data
        for name, data in v3_bytes.items()
        if name.startswith("model.layers.3.mlp.experts.10.")
    }


def test_the_same_source_gives_the_same_bytes(
    v3_folder: Path, v3_resharded: Path, tmp_path: Path, reshard_folder: Callable[..., Path], tree: Tree
) -> None:
    for jobs in (1, 5):
        assert tree(reshard_folder(v3_folder, tmp_path / f"jobs{jobs}", jobs=jobs)) == tree(v3_resharded)


def test_also_in_another_process_and_from_another_place(v2_folder: Path, tmp_path: Path, tree: Tree) -> None:
    """Sets are iterated in another order, the path is another one, so is the umask and the locale."""
    elsewhere = shutil.copytree(v2_folder, tmp_path / "some where" / "else")
    for number, (source, seed) in enumerate(((v2_folder, "1"), (elsewhere, "2"))):
        environment = os.environ | {"PYTHONHASHSEED": seed, "LC_ALL": "C" if number else "C.UTF-8"}
        command = [sys.executable, "-m", "reshard", "run", "-q", str(source), str(tmp_path / f"out{number}")]
        subprocess.run(command, env=environment, check=True, capture_output=True, umask=0o77 if number else 0o22)
    assert tree(tmp_path / "out0") == tree(tmp_path / "out1")


def test_the_manifest_comes_last_and_on_top_of_what_is_durable(
    v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(descriptor: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def seen_rename(a: Path, b: Path) -> None:
        done.append(("rename", str(b)))
        rename(a, b)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    reshard_folder(v2_folder, out)
    files = {str(path) for path in out.rglob("*") if path.is_file()}
    folders = {str(path) for path in out.rglob("*") if path.is_dir()} | {str(out)}
    renames = [path for what, path in done if what == "rename"]
    # The journal has its name first, and is gone in the end.
    assert renames[0] == str(out / "reshard-journal.jsonl")
    assert sorted(renames[1:]) == sorted(files)
    assert renames[-1] == str(out / "manifest.json")
    for path in files:
        # Its bytes are durable before it has a name.
        assert done.index(("fsync", f"{path}.partial")) < done.index(("rename", path))
    before = done[: done.index(("fsync", str(out / "manifest.json.partial")))]
    for folder in folders:
        # Every other name is durable before the manifest says so.
        names = [i for i, (what, path) in enumerate(before) if what == "rename" and os.path.dirname(path) == folder]
        assert ("fsync", folder) in before[max(names, default=0) :]
    assert done[-2:] == [("fsync", str(out)), ("fsync", str(tmp_path))]


def counting(function: Callable[..., Any], name: str, counts: dict[str, int]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*arguments, **options)

    return call


@pytest.fixture(scope="module")
def calls(
    v2_folder: Path, tmp_path_factory: pytest.TempPathFactory, reshard_folder: Callable[..., Path]
) -> dict[str, int]:
    """How often a whole run calls each function of the system."""
    counts = dict.fromkeys(("preadv", "pwrite", "fsync", "rename", "open", "mkdir"), 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            patch.setattr(os, name, counting(getattr(os, name), name, counts))
        reshard_folder(v2_folder, tmp_path_factory.mktemp("calls") / "out", jobs=1)
    return counts


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", ["preadv", "pwrite", "fsync", "rename", "open", "mkdir"])
def test_a_disk_that_fails_anywhere_leaves_nothing_or_what_can_be_gone_on_from(
    name: str, part: float, calls: dict[str, int], v2_folder: Path, v2_resharded: Path, tmp_path: Path,
    program: Program, fail_call: Callable[..., list[int]], tree: Tree, undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    if name == "mkdir" and part:
        return  # the later ones are of folders that are there already
    number = 1 + round(part * (calls[name] - 1))
    out = tmp_path / "new" / "out"
    before = tree(tmp_path)
    fail_call(name, number)
    result = program("reshard", "run", v2_folder, out, "--jobs", 1)
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "Input/output error" in result.err
    if (out / "manifest.json").exists():
        # The very last fsync, of the folder above: everything is there, and the failure is told all the same.
        assert (name, number) in (("fsync", calls["fsync"]), ("open", calls["open"]))
        return
    assert undone_or_continued(out, before, lambda: program("reshard", "run", v2_folder, out), tree(v2_resharded)) is (
        part > 0.5
    )


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_disk_that_fills_up_leaves_nothing_or_what_can_be_gone_on_from(
    part: float, calls: dict[str, int], v2_folder: Path, v2_resharded: Path, tmp_path: Path, program: Program,
    fail_call: Any, tree: Tree, undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    before = tree(tmp_path)
    fail_call("pwrite", 1 + round(part * (calls["pwrite"] - 1)), errno.ENOSPC)
    result = program("reshard", "run", v2_folder, tmp_path / "out", "--jobs", 1)
    assert (result.code, result.out) == (15, "")
    assert "no space left" in result.err
    assert undone_or_continued(
        tmp_path / "out", before, lambda: program("reshard", "run", v2_folder, tmp_path / "out"), tree(v2_resharded)
    ) is (part > 0)


def test_no_room_for_the_manifest_itself(
    v2_folder: Path, v2_resharded: Path, tmp_path: Path, program: Program, monkeypatch: Any, tree: Tree,
    undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_module, "save", full)
    result = program("reshard", "run", v2_folder, tmp_path / "out")
    assert result.code == 15
    assert "no space left" in result.err
    assert undone_or_continued(
        tmp_path / "out", {}, lambda: program("reshard", "run", v2_folder, tmp_path / "out"), tree(v2_resharded)
    )


def test_a_bug_before_the_manifest_is_gone_on_from(
    v2_folder: Path, v2_resharded: Path, tmp_path: Path, reshard_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, tree: Tree, undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    class Bug(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        assert any((tmp_path / "empty").rglob("*.safetensors"))
        raise Bug

    monkeypatch.setattr(run_module, "save", fail)
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    with pytest.raises(Bug):
        reshard_folder(v2_folder, tmp_path / "empty")
    assert undone_or_continued(
        tmp_path / "empty", before, lambda: reshard_folder(v2_folder, tmp_path / "empty"), tree(v2_resharded)
    )


def test_a_bug_before_the_first_shard_is_recorded_leaves_nothing(
    v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tree: Tree
) -> None:
    class Bug(Exception):
        pass

    append = Journal.append

    def fail(self: Journal, record: dict[str, Any]) -> None:
        if "shard" in record:
            assert any(tmp_path.rglob("*.safetensors*"))
            raise Bug
        append(self, record)

    monkeypatch.setattr(Journal, "append", fail)
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        with pytest.raises(Bug):
            reshard_folder(v2_folder, out)
        assert tree(tmp_path) == before


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from reshard.cli import reshard
reshard.main(sys.argv[1:], prog_name="reshard")
"""


def test_a_real_limit_on_file_size(v3_folder: Path, tmp_path: Path, tree: Tree) -> None:
    """EFBIG from the kernel, in mid-run: the small files are through, a larger one is not."""
    before = tree(tmp_path)
    command = [sys.executable, "-c", LIMITED, "run", str(v3_folder), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (15, "", 1), result.stderr
    assert "no space left" in result.stderr
    assert tree(tmp_path) == before


def test_too_little_room_is_found_before_anything_is_written(
    v3_folder: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch, tree: Tree, plan_of: Any
) -> None:
    needed = program("reshard", "plan", v3_folder, "--json").json["needed_bytes"]
    real = os.statvfs
    asked: list[str] = []

    def statvfs(path: Any) -> Any:
        asked.append(str(path))
        status = list(real(path))
        status[1], status[4] = 1, room  # f_frsize, f_bavail
        return os.statvfs_result(status)

    monkeypatch.setattr(os, "statvfs", statvfs)
    room = needed - 1
    for arguments in (["run"], ["run", "--dry-run"], ["plan"]):
        result = program("reshard", *arguments, v3_folder, tmp_path / "a" / "b")
        assert (result.code, result.err.count("\n")) == (15, 1)
        assert (result.out == "") is (arguments == ["run"])  # a plan is told all the same
        assert f"needs {needed:,} bytes, the disk has {room:,} free; nothing was written" in result.err
        peak = run_module.consume_peak_bytes(*plan_of(v3_folder))
        assert (f"--consume, which deletes each shard when it is done, needs {peak:,}" in result.err) is (
            arguments == ["run"]
        )
        assert tree(tmp_path) == {}
    assert set(asked) <= {str(tmp_path), str(tmp_path / "a" / "b")}
    room = needed
    assert program("reshard", "run", v3_folder, tmp_path / "a" / "b").code == 0
    used = sum(path.stat().st_size for path in (tmp_path / "a" / "b").rglob("*") if path.is_file())
    assert 0.8 * needed < used <= needed


def prepare(kind: str, source: Path, tmp_path: Path) -> Path:
    """A destination that must not be taken."""
    out = tmp_path / "out"
    if kind == "not empty":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif kind == "not empty but hidden":
        out.mkdir()
        (out / ".mine").write_text("mine")
    elif kind == "a file":
        out.write_text("mine")
    elif kind == "below a file":
        out.write_text("mine")
        return out / "sub"
    elif kind == "a dangling link":
        out.symlink_to("nowhere")
    elif kind == "a link to what is not empty":
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("mine")
        out.symlink_to("full")
    elif kind == "a FIFO":
        os.mkfifo(out)
    elif kind == "the source":
        return source
    elif kind == "inside the source":
        return source / "deep" / "out"
    elif kind == "around the source":
        return source.parent
    elif kind == "inside by a link":
        out.symlink_to(source)
        return out / "sub"
    elif kind == "inside by dots":
        return source / ".." / source.name / "out"
    return out


@pytest.mark.parametrize(
    "kind",
    [
        "not empty", "not empty but hidden", "a file", "below a file", "a dangling link", "a link to what is not empty",
        "a FIFO", "the source", "inside the source", "around the source", "inside by a link", "inside by dots",
    ],
)  # fmt: skip
def test_destinations_that_are_not_taken(
    kind: str, v2_folder: Path, tmp_path: Path, program: Program, tree: Tree, deadline: None
) -> None:
    source = shutil.copytree(v2_folder, tmp_path / "parent" / "source")
    out = prepare(kind, source, tmp_path)
    before = tree(tmp_path)
    for arguments in (["run"], ["run", "--dry-run"]):
        if kind in ("below a file", "a dangling link") and "--dry-run" in arguments:
            continue  # only making it shows that it cannot be made
        result = program("reshard", *arguments, source, out)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1), result
        assert tree(tmp_path) == before


def test_an_empty_folder_and_a_link_to_one_are_taken(
    v2_folder: Path, tmp_path: Path, program: Program, stamps: Callable[[Path], Any]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert program("reshard", "run", v2_folder, tmp_path / "link").code == 0
    assert program("manifests", "check", tmp_path / "empty").code == 0
    before = stamps(tmp_path / "empty")
    again = program("reshard", "run", v2_folder, tmp_path / "empty", "--json")
    assert (again.code, json.loads(again.out.splitlines()[-1])["moved_bytes"]) == (0, 0)
    assert stamps(tmp_path / "empty") == before  # never written again
    (tmp_path / "empty" / "manifest.json").unlink()
    assert program("reshard", "run", v2_folder, tmp_path / "empty").code == 1  # and never overwritten
    assert program("reshard", "run", v2_folder, tmp_path / "link").code == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "sigterm", "sighup"])
def test_an_interrupt_in_mid_run(
    number: signal.Signals, v3_folder: Path, v3_resharded: Path, tmp_path: Path, tree: Tree, program: Program,
    stop_in_mid_run: Callable[..., tuple[int, str]], undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    seen: list[bool] = []
    out = tmp_path / "out"
    code, err = stop_in_mid_run(["run", v3_folder, out], number, then=lambda: seen.append(any(out.rglob("*.partial"))))
    assert seen == [True]
    says = "the same command goes on from the last finished shard, --discard starts again"
    hint = f"{out}: {says}\n" if (out / "reshard-journal.jsonl").exists() else ""
    assert (code, err) == (130, f"{hint}\nreshard: interrupted\n")
    undone_or_continued(out, {}, lambda: program("reshard", "run", v3_folder, out), tree(v3_resharded))


def test_an_impatient_interrupt(
    v3_folder: Path, v3_resharded: Path, tmp_path: Path, stop_in_mid_run: Callable[..., tuple[int, str]],
    program: Program, tree: Tree, undone_or_continued: Callable[..., bool],
) -> None:  # fmt: skip
    """All but the first request are ignored until everything is clean; the last ones may find a process that ends."""
    code, err = stop_in_mid_run(["run", v3_folder, tmp_path / "out"], *[signal.SIGINT, signal.SIGTERM] * 4)
    assert code in (130, -signal.SIGINT, -signal.SIGTERM)
    assert "RuntimeError" not in err
    out = tmp_path / "out"
    undone_or_continued(out, {}, lambda: program("reshard", "run", v3_folder, out), tree(v3_resharded))


def test_a_kill_leaves_no_manifest_and_is_gone_on_from(
    v3_folder: Path, v3_resharded: Path, tmp_path: Path, stop_in_mid_run: Callable[..., tuple[int, str]],
    program: Program, tree: Tree,
) -> None:  # fmt: skip
    code, _ = stop_in_mid_run(["run", v3_folder, tmp_path / "out"], signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert any((tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(IncompleteError, match="the same `reshard` command that began it goes on with it"):
        manifests.open(tmp_path / "out")
    assert program("reshard", "run", v3_folder, tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == tree(v3_resharded)


def test_one_writer_at_a_time(
    v3_folder: Path, tmp_path: Path, stop_in_mid_run: Callable[..., tuple[int, str]], program: Program
) -> None:
    """The second one is refused and takes nothing of the first one away."""
    out = tmp_path / "out"
    results: list[Any] = []

    def second() -> None:
        before = {path.name for path in out.rglob("*.partial")}
        results.append(program("reshard", "run", v3_folder, out))
        results.append(before <= {path.name.removesuffix(".partial") + ".partial" for path in out.rglob("*")})

    stop_in_mid_run(["run", v3_folder, out], signal.SIGTERM, then=second)
    assert (results[0].code, results[0].err.count("\n")) == (11, 1)
    assert results[1] is True


BOUNDED = """
import sys
from reshard.cli import reshard
for arguments in (["run", sys.argv[1], sys.argv[2]], ["verify", sys.argv[2]], ["restore", sys.argv[2], "--check"]):
    try:
        reshard.main([*arguments, "-q", "--jobs", "2"], prog_name="reshard")
    except SystemExit as ended:
        assert ended.code == 0, arguments
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """One tensor and one auxiliary file of 160 MB each, sparse: neither is ever in memory as a whole."""
    size = 160_000_000
    source = tmp_path / "source"
    source.mkdir()
    header = b'{"lm_head.weight":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(source / "model.safetensors", 8 + len(header) + size)
    (source / "paper.pdf").touch()
    os.truncate(source / "paper.pdf", size)
    command = [sys.executable, "-c", BOUNDED, str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 120_000  # kB; Python with click, tqdm and zstandard takes about 35,000
    shutil.rmtree(tmp_path / "out")


def test_a_part_says_what_it_is(
    v3_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], v3_bytes: dict[str, bytes]
) -> None:
    out = reshard_folder(v3_folder, tmp_path / "part", Selection(layers=(1, 3), experts=(0, 10)))
    checkpoint = manifests.open(out)
    assert (checkpoint.layers, checkpoint.experts(1), checkpoint.experts(3)) == ((1, 3), (0, 10), (0, 10))
    assert checkpoint.manifest.selection == Selection(layers=(1, 3), experts=(0, 10))
    for location in checkpoint.tensors():
        with Path(location.place).open("rb") as file:
            file.seek(location.offset)
            assert file.read(location.size) == v3_bytes[location.name]
    source = checkpoint.manifest.source
    assert source is not None
    assert any(shard.sha256 is None for shard in source.shards)
    for shard in source.shards:
        whole = [name for name, _ in safetensors.deserialize((v3_folder / shard.name).read_bytes())]
        assert (shard.sha256 is not None) == all(name in checkpoint for name in whole)


def test_a_selection_of_everything_is_as_good_as_none(
    v3_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path]
) -> None:
    out = reshard_folder(v3_folder, tmp_path / "all", Selection(layers=(0, 1, 2, 3)))
    source = manifests.open(out).manifest.source
    assert source is not None
    assert all(shard.sha256 for shard in source.shards)


def test_errors_are_the_projects_own(
    v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], fail_call: Any
) -> None:
    fail_call("pwrite", 3, errno.ENOSPC)
    with pytest.raises(ResourceError):
        reshard_folder(v2_folder, tmp_path / "a")
    fail_call("fsync", 1)
    with pytest.raises(ToolkitError):
        reshard_folder(v2_folder, tmp_path / "b")
