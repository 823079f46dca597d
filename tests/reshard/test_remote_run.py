"""Resharding from a web server: the bytes of a local copy, hardly any fetched twice, and every failure a sentence."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import manifests
from manifests import http, patience
from manifests import hub as repositories
from manifests.paths import INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME
from manifests.schema import Selection
from reshard import fetching, transfer
from reshard.plan import make_plan
from reshard.source import read_source
from runner.demo.shards import StoredTensor
from tests.fake_hub import NAME, FakeHub, fake_hub
from tests.file_server import Answer, Asked, FileServer, no_fault, serve
from tests.wrong_answers import DROP, flip, gone_after, once

Program = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]

CHUNKED = (
    "manifests.digest",
    "manifests.validate",
    "reshard.resume",
    "reshard.run",
    "reshard.transfer",
    "reshard.verify",
)
SMALL = {f"{module}.CHUNK_BYTES": 16_384 for module in CHUNKED} | {
    "reshard.transfer.LEAST_PART_BYTES": 100_000,
    "reshard.transfer.PART_SECONDS": 0.0,
    "reshard.fetching.SEGMENT_BYTES": 40_000,
    "manifests.shards.FIRST_BYTES": 8,
    "manifests.patience.FIRST_PAUSE_S": 0.001,
}
"""A small checkpoint in as many segments, parts and chunks as a large one."""


@pytest.fixture
def usual_v3(v3_copy: Path) -> Path:
    """The V3-like checkpoint with no other small files than those that are asked for."""
    (v3_copy / "empty.txt").unlink()
    shutil.rmtree(v3_copy / "figures")
    return v3_copy


@pytest.fixture
def server(usual_v3: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """It, on a server; whoever must wait waits for no time."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    with serve(usual_v3) as found:
        yield found


@pytest.fixture
def many(
    tmp_path: Path, write_shards: Any, random_tensor: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FileServer]:
    """Three shards of 40 tensors of 64 KiB and some of 1 MiB, in small parts and segments."""
    shards: list[list[StoredTensor]] = [
        [
            random_tensor(f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight", "BF16", 128, 256)
            for expert in range(layer % 2, 10 + layer % 2)
            for part in ("gate", "up", "down", "odd")
        ]
        for layer in range(3)
    ]
    shards[0].insert(0, random_tensor("model.embed_tokens.weight", "BF16", 1024, 512))
    shards[2] += [random_tensor("model.norm.weight", "BF16", 7), random_tensor("lm_head.weight", "BF16", 1001, 512)]
    folder = write_shards(tmp_path / "many", shards)
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)
    with serve(folder) as found:
        yield found


@pytest.fixture
def hub(many: FileServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The Hub with the same folder; large files come from the server."""
    with fake_hub(many.root, many.url, monkeypatch) as found:
        yield found


def needed(root: Path, selection: Selection | None = None) -> dict[str, list[tuple[int, int]]]:
    """The ranges of every shard that a plan needs, neighbours together."""
    found: dict[str, list[tuple[int, int]]] = {}
    for shard, tensors in make_plan(read_source(root), selection or Selection()).by_shard().items():
        found[shard] = merged((tensor.source_offset, tensor.source_offset + tensor.size) for tensor in tensors)
    return found


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, neighbours together, empty ones left out."""
    found: list[tuple[int, int]] = []
    for begin, end in ranges:
        follows = found and found[-1][1] == begin
        if begin < end:
            found.append((found.pop()[0] if follows else begin, end))
    return found


def payload_ranges(server: FileServer, name: str) -> list[tuple[int, int]]:
    """What was sent of a shard behind its header, neighbours together."""
    header = 8 + int.from_bytes((server.root / name).read_bytes()[:8], "little")
    ranges = sorted((begin, end) for begin, end in server.spans.get(name, []) if end > header)
    assert all(begin >= header for begin, _ in ranges)
    return merged(ranges)


@pytest.mark.parametrize("jobs", [1, 3, 8])
def test_the_result_is_that_of_a_local_copy(
    server: FileServer, tmp_path: Path, program: Program, tree: Tree, reshard_folder: Any, jobs: int
) -> None:
    expected = tree(reshard_folder(server.root, tmp_path / "local"))
    ran = program("reshard", "run", server.url, tmp_path / "out", "--jobs", jobs)
    assert ran.code == 0, ran.err
    assert tree(tmp_path / "out") == expected
    assert "other small files, if there are any" in ran.err
    assert server.url.removeprefix("http://") not in (tmp_path / "out" / MANIFEST_NAME).read_text()
    assert program("reshard", "restore", tmp_path / "out", "--check").code == 0


def test_a_model_of_one_file(
    single_folder: Path, tmp_path: Path, program: Program, tree: Tree, reshard_folder: Any
) -> None:
    expected = tree(reshard_folder(single_folder, tmp_path / "local"))
    with serve(single_folder) as server:
        assert program("reshard", "run", f"{server.url}/", tmp_path / "out", "--jobs", 4).code == 0
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("options", [["--layers", "1"], ["--layers", "1-2", "--experts", "0,3"], []])
def test_only_what_is_asked_for_is_fetched_and_nothing_twice(
    server: FileServer,
    tmp_path: Path,
    program: Program,
    tree: Tree,
    reshard_folder: Any,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("manifests.shards.FIRST_BYTES", 8)
    selection = Selection(
        layers=None if not options else (1,) if len(options) == 2 else (1, 2),
        experts=(0, 3) if len(options) == 4 else None,
    )
    expected = tree(reshard_folder(server.root, tmp_path / "local", selection))
    ran = program("reshard", "run", server.url, tmp_path / "out", *options)
    assert ran.code == 0, ran.err
    assert tree(tmp_path / "out") == expected
    ranges = needed(server.root, selection)
    for shard in server.root.glob("model-*.safetensors"):
        assert payload_ranges(server, shard.name) == ranges.get(shard.name, []), shard.name


def test_what_is_there_is_not_fetched_again_when_more_is_added(
    server: FileServer, tmp_path: Path, program: Program, tree: Tree, v3_resharded: Path, reshard_folder: Any
) -> None:
    expected = tree(reshard_folder(server.root, tmp_path / "local"))
    assert program("reshard", "run", server.url, tmp_path / "out", "--layers", "1").code == 0
    server.forget()
    planned = program("reshard", "plan", server.url, tmp_path / "out", "--json").json
    assert planned["state"] == "part"
    server.forget()
    assert program("reshard", "run", server.url, tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == expected
    server.forget()
    ran = program("reshard", "run", server.url, tmp_path / "out")
    assert "all of it was there already" in ran.out


def test_the_plan_says_what_was_found(server: FileServer, tmp_path: Path, program: Program) -> None:
    remote_plan = program("reshard", "plan", server.url, tmp_path / "out", "--json").json
    local_plan = program("reshard", "plan", server.root, tmp_path / "out", "--json").json
    same = ("shards", "tensors", "payload_bytes", "files", "auxiliary", "needed_bytes", "unknown_tensors", "state")
    assert {key: remote_plan[key] for key in same} == {key: local_plan[key] for key in same}
    assert remote_plan["source"] == server.url
    assert remote_plan["left_out"] == ["other small files, if there are any (the server does not list what it has)"]
    assert not (tmp_path / "out").exists()
    assert program("reshard", "plan", server.url).code == 0


def test_the_plan_measures_the_server(
    many: FileServer, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program("reshard", "plan", many.url, "--json").json["seconds"] is None
    sizes = [path.stat().st_size for path in many.root.glob("*.safetensors")]
    assert many.sent(".safetensors") < sum(sizes) / 10
    monkeypatch.setattr("reshard.cli_plan.BLOCK_BYTES", 1 << 20)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("reshard.cli_plan.measure_arrival_rate", lambda _, *ends: asked.append(ends) or 1e4)
    planned = program("reshard", "plan", many.url, tmp_path / "out", "--json").json
    assert planned["seconds"] == planned["read_bytes"] / 1e4
    assert (planned["limited_by"], planned["read_bytes_per_s"]) == ("reading", 1e4)
    (ends,) = asked
    assert ends[1] == max(sizes)


def test_the_hub_tells_what_there_is(
    v3_folder: Path,
    tmp_path: Path,
    program: Program,
    tree: Tree,
    reshard_folder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = tree(reshard_folder(v3_folder, tmp_path / "local"))
    local = program("reshard", "plan", v3_folder, "--json").json
    with serve(v3_folder) as server, fake_hub(v3_folder, server.url, monkeypatch):
        planned = program("reshard", "plan", NAME, "--json").json
        assert planned["auxiliary"] == local["auxiliary"]
        assert sorted(planned["left_out"]) == sorted(local["left_out"])
        ran = program("reshard", "run", NAME, tmp_path / "out")
        assert ran.code == 0, ran.err
    assert tree(tmp_path / "out") == expected


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("where", [0.2, 0.9])
def test_a_changed_byte_is_seen_where_the_sha256_is_published(
    many: FileServer, tmp_path: Path, program: Program, tree: Tree, reshard_folder: Any, where: float
) -> None:
    expected = tree(reshard_folder(many.root, tmp_path / "local"))
    out = tmp_path / "out"
    shard = sorted(path.name for path in many.root.glob("*.safetensors"))[1]
    many.instead = once(flip(shard, int((many.root / shard).stat().st_size * where)))
    failed = program("reshard", "run", NAME, out, "--jobs", 1)
    assert failed.code == 13
    assert shard in failed.err
    assert "is published" in failed.err
    records = [json.loads(line)["record"] for line in (out / JOURNAL_NAME).read_text().splitlines()]
    assert records[-1]["wrong"] == shard
    many.forget()
    ran = program("reshard", "run", NAME, out, "--jobs", 1)
    assert ran.code == 0, ran.err
    assert tree(out) == expected
    # All of it came anew, and nothing of the shard that had been done before.
    assert many.sent(shard) == (many.root / shard).stat().st_size
    first = sorted(path.name for path in many.root.glob("*.safetensors"))[0]
    assert payload_ranges(many, first) == []


@pytest.mark.usefixtures("hub")
def test_a_changed_byte_of_a_part_is_seen_when_the_rest_comes(
    many: FileServer,
    tmp_path: Path,
    program: Program,
    tree: Tree,
    reshard_folder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No sha256 of a shard proves a part of it; that of all of it does, and then the part is fetched anew too."""
    expected = tree(reshard_folder(many.root, tmp_path / "local"))
    out = tmp_path / "out"
    by_shard = make_plan(read_source(many.root), Selection(layers=(1,), experts=(3,))).by_shard()
    tensor = next(t for tensors in by_shard.values() for t in tensors if "experts.3.up" in t.name)
    many.instead = once(flip(tensor.shard, tensor.source_offset + 70))
    assert program("reshard", "run", NAME, out, "--layers", 1, "--experts", 3).code == 0
    monkeypatch.setattr("reshard.earlier.FAR_SAMPLES", 1)
    failed = program("reshard", "run", NAME, out)
    assert failed.code == 13
    assert tensor.shard in failed.err
    assert program("reshard", "run", NAME, out).code == 0
    assert tree(out) == expected


@pytest.mark.usefixtures("hub")
def test_a_small_file_of_another_size_than_is_published(
    many: FileServer, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    (many.root / "LICENSE").write_text("all of it")
    real = repositories.resolve

    def resolve(text: str) -> Any:
        found = real(text)
        found.files["LICENSE"] = repositories.Listed(size=4, sha256=None)
        return found

    monkeypatch.setattr(repositories, "resolve", resolve)
    refused = program("reshard", "run", NAME, tmp_path / "out")
    assert refused.code == 13
    assert "LICENSE: has 9 bytes, 4 are published" in refused.err


def test_an_interrupt_says_how_to_go_on(many: FileServer, tmp_path: Path, stop_in_mid_run: Any) -> None:
    code, err = stop_in_mid_run(["run", many.url, tmp_path / "out"], signal.SIGINT)
    assert code == 130
    if (tmp_path / "out" / JOURNAL_NAME).exists():
        assert "the same command goes on from what is safe on disk" in err


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("what", ["model-00002", "chat_template", "model.safetensors.index"])
def test_an_interrupt_while_the_server_is_silent(many: FileServer, tmp_path: Path, what: str) -> None:
    """Whoever presses Ctrl-C does not wait for a server."""
    asked, go_on = threading.Event(), threading.Event()

    def silent(request: Asked, right: Answer) -> None:
        if request.name.startswith(what):
            asked.set()
            go_on.wait(15)

    many.instead = silent
    with subprocess.Popen(
        [sys.executable, "-m", "reshard", "run", many.url, str(tmp_path / "out")], stderr=subprocess.PIPE
    ) as process:
        assert asked.wait(10)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.wait(12)
        assert time.monotonic() - began < 6
        go_on.set()
        assert process.returncode == 130


def test_bytes_that_stay_wrong_are_refused_each_time(tmp_path: Path, program: Program, hub: FakeHub) -> None:
    hub.published = lambda _: "0" * 64
    for _ in range(2):
        failed = program("reshard", "run", NAME, tmp_path / "out")
        assert failed.code == 13
        assert "run again" in failed.err
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_a_file_that_changes_on_the_server_is_refused(many: FileServer, tmp_path: Path, program: Program) -> None:
    shard = sorted(path.name for path in many.root.glob("*.safetensors"))[2]
    number = itertools.count(1)

    def change(asked: Asked, right: Answer) -> None:
        if asked.name == shard and next(number) == 20:
            many.etag = lambda path: f'"other {path}"'

    many.instead = change
    out = tmp_path / "out"
    failed = program("reshard", "run", many.url, out, "--jobs", 2)
    assert failed.code == 13
    assert "changed on the server" in failed.err
    # What was taken of the file as it was is not mixed with what it is now.
    again = program("reshard", "run", many.url, out)
    assert again.code == 12
    assert "--discard" in again.err
    assert program("reshard", "run", many.url, out, "--discard").code == 0
    assert program("reshard", "verify", out).code == 0


def test_a_run_goes_on_under_another_signature_and_a_weakened_name(
    many: FileServer, tmp_path: Path, program: Program
) -> None:
    """The first signature expires in mid-run; the server that answers the second one packs, so it weakens names."""
    number = itertools.count(1)

    def expire(asked: Asked, right: Answer) -> Answer | None:
        is_late = asked.name.endswith(".safetensors") and next(number) > 60
        return Answer(403, {}, b"<Error><Code>AccessDenied") if is_late else None

    many.instead = expire
    out = tmp_path / "out"
    failed = program("reshard", "run", f"{many.url}?sig=one", out)
    assert failed.code == 10
    assert "the signature in the address may have expired" in failed.err
    many.instead, etag = no_fault, many.etag
    many.etag = lambda path: f"W/{etag(path)}"
    sent = many.sent(".safetensors")
    assert program("reshard", "run", f"{many.url}?sig=two", out).code == 0
    assert program("reshard", "verify", out).code == 0
    # It went on: not all was fetched again.
    assert many.sent(".safetensors") - sent < sum(path.stat().st_size for path in many.root.glob("*.safetensors"))


def test_a_busy_server_is_waited_for_as_long_as_it_asks(
    server: FileServer, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    real = http.time.sleep
    monkeypatch.setattr(http.time, "sleep", lambda s: waited.append(s) or real(0))
    numbers = {path.name: itertools.count(1) for path in server.root.glob("*.safetensors")}

    def busy(asked: Asked, right: Answer) -> Answer | None:
        is_second = asked.name in numbers and next(numbers[asked.name]) == 2
        return Answer(503, {"Retry-After": "7"}) if is_second else None

    server.instead = busy
    monkeypatch.setattr("manifests.shards.FIRST_BYTES", 8)
    assert program("reshard", "run", server.url, tmp_path / "out").code == 0
    assert waited.count(7.0) > 10


@pytest.mark.parametrize("kind", ["cut", "drop"])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    many: FileServer, tmp_path: Path, program: Program, tree: Tree, reshard_folder: Any, kind: str
) -> None:
    expected = tree(reshard_folder(many.root, tmp_path / "local"))
    numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)

    def broken(asked: Asked, right: Answer) -> Answer | None:
        # The same ranges whichever thread comes first, and none more often in a row than is borne.
        what = f"{asked.path} {asked.range}"
        if next(numbers[what]) >= random.Random(what).choice((0, 0, 0, 1, 2)):
            return None
        return DROP if kind == "drop" else right.cut(len(right.body) // 2)

    many.instead = broken
    ran = program("reshard", "run", many.url, tmp_path / "out")
    assert ran.code == 0, ran.err
    assert tree(tmp_path / "out") == expected
    size = sum(path.stat().st_size for path in many.root.glob("*.safetensors"))
    assert many.sent(".safetensors") == size


def test_a_server_that_went_away_and_came_back(
    many: FileServer, tmp_path: Path, program: Program, tree: Tree, reshard_folder: Any
) -> None:
    expected = tree(reshard_folder(many.root, tmp_path / "local"))
    out, runs = tmp_path / "out", 0
    size = sum(path.stat().st_size for path in many.root.glob("*.safetensors"))
    window = 4 * fetching.AHEAD * fetching.SEGMENT_BYTES + 2 * (transfer.LEAST_PART_BYTES + 65536)
    while True:
        many.instead = gone_after(60 + 7 * runs, lambda asked: asked.name.endswith(".safetensors"))
        ran = program("reshard", "run", many.url, out, "--jobs", 2)
        if ran.code == 0:
            break
        assert ran.code == 1, ran.err
        assert "times in a row; run again later" in ran.err
        runs += 1
        assert runs < 20
    assert runs >= 2
    assert tree(out) == expected
    assert many.sent(".safetensors") <= size + runs * window


KILLED = """
import importlib, json, os, sys, time
from reshard.cli import reshard
from reshard.progress import Progress
for name, value in json.loads(sys.argv.pop(1)).items():
    module, _, key = name.rpartition(".")
    setattr(importlib.import_module(module), key, value)
advance = Progress.advance
def slow(self, count):
    advance(self, count)
    os.write(1, b"moving\\n")
    time.sleep(0.001)
Progress.advance = slow
os.fsync = lambda descriptor: None
reshard.main(sys.argv[1:], prog_name="reshard")
"""


@pytest.mark.parametrize("jobs", [1, 4])
def test_killed_anywhere_it_goes_on_and_fetches_little_twice(
    many: FileServer, tmp_path: Path, program: Program, tree: Tree, reshard_folder: Any, jobs: int
) -> None:
    expected = tree(reshard_folder(many.root, tmp_path / "local"))
    out, dice, kills = tmp_path / "out", random.Random(jobs), 0
    while True:
        # Once more at some point of what is left; each run shows a step for each block.
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, json.dumps(SMALL), "run", many.url, str(out), "--jobs", str(jobs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            for _ in range(dice.randrange(20, 160)):
                if not process.stdout.readline():
                    break
            process.send_signal(signal.SIGKILL)
            process.stdout.read()
        if process.returncode == 0 or (out / MANIFEST_NAME).exists():
            break
        kills += 1
        assert kills < 30
    sent = many.sent(".safetensors")
    assert program("reshard", "run", many.url, out).code == 0
    assert tree(out) == expected
    size = sum(path.stat().st_size for path in many.root.glob("*.safetensors"))
    # What was under way, and what had arrived and was in no part yet.
    window = jobs * fetching.AHEAD * 40_000 + 2 * (transfer.LEAST_PART_BYTES + 65536)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in many.root.glob("*.safetensors"))
    assert kills >= 2
    assert sent <= size + kills * (window + headers) + headers


@pytest.mark.parametrize("is_damaged", [False, True])
def test_it_goes_on_within_a_large_tensor(
    many: FileServer, tmp_path: Path, program: Program, tree: Tree, reshard_folder: Any, is_damaged: bool
) -> None:
    selection = Selection(layers=(1,), experts=(1,))
    expected = tree(reshard_folder(many.root, tmp_path / "local", selection))
    out, name = tmp_path / "out", "model.embed_tokens.weight"
    arguments = ["run", many.url, out, "--jobs", 1, "--layers", 1, "--experts", 1]
    shard = make_plan(read_source(many.root), selection).by_shard()

    def is_large(asked: Asked) -> bool:
        begin, end = asked.span or (0, 0)
        return asked.name in shard and end - begin > 10_000

    many.instead = gone_after(15, is_large)
    assert program("reshard", *arguments).code == 1
    many.instead = no_fault
    records = [json.loads(line)["record"] for line in (out / JOURNAL_NAME).read_text().splitlines()]
    begun = len(records[-1]["begun"][name])
    assert 10 <= begun < 64
    tensor = next(t for tensors in shard.values() for t in tensors if t.name == name)
    if is_damaged:
        with next(out.rglob("*embed*.partial")).open("rb+") as file:
            file.seek(tensor.output_offset + 5 * 16_384)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    options = ["--layers", 1, "--experts", 1]
    assert program("reshard", "plan", many.url, out, *options, "--json").json["state"] == "interrupted"
    many.forget()
    ran = program("reshard", *arguments, "--json")
    assert ran.code == 0, ran.err
    assert tree(out) == expected
    end = json.loads(ran.out.splitlines()[-1])
    assert end["kept_bytes"] == (0 if is_damaged else begun * 16_384)
    (first, *_) = payload_ranges(many, tensor.shard)
    assert first[0] == tensor.source_offset + (0 if is_damaged else begun * 16_384)


def test_damage_to_what_was_fetched_is_seen_and_mended(
    many: FileServer, tmp_path: Path, program: Program, tree: Tree, reshard_folder: Any
) -> None:
    """A finished file is believed until its shard's sha256 needs it."""
    expected = tree(reshard_folder(many.root, tmp_path / "local"))
    out = tmp_path / "out"
    many.instead = gone_after(50, lambda asked: asked.name.endswith(".safetensors"))
    assert program("reshard", "run", many.url, out, "--jobs", 1).code == 1
    many.instead = no_fault
    done = sorted(out.glob("layers/*/experts/*.safetensors"))
    assert done
    with done[0].open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    failed = program("reshard", "run", many.url, out)
    assert failed.code == 13
    assert "--paranoid" in failed.err
    assert program("reshard", "run", many.url, out, "--paranoid").code == 0
    assert tree(out) == expected


def test_a_run_that_began_elsewhere_is_not_mixed(
    many: FileServer, tmp_path: Path, program: Program, stop_after: Any
) -> None:
    out = tmp_path / "out"
    with stop_after(1):
        program("reshard", "run", many.root, out)
    refused = program("reshard", "run", many.url, out)
    assert refused.code == 12
    assert "read from a folder of this machine" in refused.err
    assert program("reshard", "run", many.url, out, "--discard").code == 0
    assert program("reshard", "verify", out).code == 0


@pytest.mark.parametrize(
    "name", ["../away.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "http://x/y.safetensors"]
)
def test_names_in_an_index_that_lead_elsewhere(server: FileServer, tmp_path: Path, program: Program, name: str) -> None:
    index = json.loads((server.root / INDEX_NAME).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (server.root / INDEX_NAME).write_text(json.dumps(index))
    refused = program("reshard", "run", server.url, tmp_path / "out")
    assert refused.code == 12
    assert "refused" in refused.err
    assert not (tmp_path / "out").exists()


def test_hostile_names_in_a_listing_are_left_out(
    single_folder: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = repositories.resolve

    def resolve(text: str) -> Any:
        found = real(text)
        object.__setattr__(found, "files", dict(found.files) | {"../up.json": repositories.Listed(size=3, sha256=None)})
        return found

    monkeypatch.setattr(repositories, "resolve", resolve)
    with serve(single_folder) as server, fake_hub(single_folder, server.url, monkeypatch) as hub:
        ran = program("reshard", "run", NAME, tmp_path / "out")
        assert ran.code == 0, ran.err
        assert "'../up.json' (name has an empty, '.' or '..' part)" in ran.err
        assert not [asked for asked in server.asked + hub.asked if "up.json" in asked.path]


def test_what_is_for_folders_of_this_machine_says_so(server: FileServer, tmp_path: Path, program: Program) -> None:
    refused = program("reshard", "run", server.url, tmp_path / "out", "--consume", "--yes")
    assert refused.code == 2
    assert "is on a server" in refused.err
    assert not (tmp_path / "out").exists()
    for arguments in (
        ["run", server.root, server.url],
        ["verify", server.url],
        ["restore", server.url, tmp_path / "out"],
        ["pack", server.url],
        ["unpack", server.url],
        ["doctor", server.url, tmp_path / "out"],
        ["repair", server.url, "--from", server.root],
    ):
        refused = program("reshard", *arguments)
        assert refused.code == 2, arguments
        assert "is an address" in refused.err
        assert "http:" not in os.listdir()


def test_the_address_of_something_else(server: FileServer, tmp_path: Path, program: Program) -> None:
    shard = sorted(server.root.glob("model-*.safetensors"))[0].name
    for url, code, said in (
        (f"{server.url}/{shard}", 10, "is not a checkpoint; give the address of the folder"),
        (f"{server.url}/nothing", 10, "no manifest.json"),
        ("ftp://host/model", 10, "http, https and hf addresses"),
    ):
        refused = program("reshard", "run", url, tmp_path / "out")
        assert refused.code == code
        assert said in refused.err
    (server.root / MANIFEST_NAME).write_text("{}")
    refused = program("reshard", "plan", server.url)
    assert refused.code == 12
    assert "already resharded" in refused.err


def test_a_password_is_shown_nowhere(server: FileServer, tmp_path: Path, program: Program) -> None:
    url = server.url.replace("http://", "http://me:secret@")
    for command in (["plan", url], ["run", url, tmp_path / "out"], ["run", url, tmp_path / "json", "--json"]):
        said = program("reshard", *command)
        assert said.code == 0
        assert "secret" not in said.out + said.err
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes()
    assert manifests.open(tmp_path / "out").manifest == manifests.open(tmp_path / "json").manifest


def test_headers_are_shown_on_a_terminal(server: FileServer, tmp_path: Path, program: Program) -> None:
    out = tmp_path / "out"
    shown = 0

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for command in (["plan", server.url], ["run", server.url, out], ["repair", out, "--from", server.url]):
        with pytest.MonkeyPatch.context() as patch:
            terminal = Terminal()
            patch.setattr("manifests.console.sys", SimpleNamespace(stderr=terminal, stdout=sys.stdout, exit=sys.exit))
            assert program("reshard", *command).code == 0
        shown += "headers" in terminal.getvalue()
    assert shown == 3
