"""Running from afar when things go wrong: damage, changes, lost connections, kills, two processes, full disks."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import manifests
from manifests import patience
from manifests.errors import IntegrityError, ManifestError, RemoteError, ResourceError
from manifests.storage import save
from runner import demo
from runner.cache_folder import ENVIRONMENT, CacheFolder
from runner.loaded import LoadedModel
from runner.mirror import Mirror
from tests.file_server import Answer, FileServer, no_fault, serve
from tests.wrong_answers import flip, once

Call = Callable[..., Result]
HEAD = "model/head.safetensors"
IDS = [3, 17, 200, 5]


@pytest.fixture(autouse=True)
def cache(memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT, str(memory_folder))
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    return memory_folder


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory, reshard_folder: Callable[..., Path]) -> Path:
    found: Path = reshard_folder(demo.path(), tmp_path_factory.mktemp("demo") / "experts")
    return found


@pytest.fixture
def copy(resharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(resharded, tmp_path / "copy")


@pytest.fixture
def server(resharded: Path) -> Iterator[FileServer]:
    with serve(resharded) as found:
        yield found


@pytest.fixture
def of_copy(copy: Path) -> Iterator[FileServer]:
    with serve(copy) as found:
        yield found


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return LoadedModel(ctx=64).logits(IDS)


def logits(url: str, **options: Any) -> torch.Tensor:
    return LoadedModel(url, ctx=64, **options).logits(IDS)


def generate(url: str, *more: str, **environment: str) -> subprocess.Popen[bytes]:
    """A process of its own; one thread, for text does not depend on it."""
    arguments = ["generate", "-m", url, "-p", "def main(", "-n", "12", "--temp", "0", "--threads", "1", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "runner", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def text() -> bytes:
    """What these processes write."""
    process = generate(str(demo.path()))
    found, _ = process.communicate(timeout=120)
    return found


def marked(cache: Path) -> dict[str, list[tuple[int, int]]]:
    """The byte ranges that the cache says are there, by file."""
    found: dict[str, list[tuple[int, int]]] = {}
    for path in cache.glob("states/*/tensors/**/*.safetensors"):
        mirror = Mirror.open(path)
        assert mirror is not None
        with closing(mirror):
            name = str(path).split("/tensors/")[1]
            found[name] = [(entry.begin, entry.end) for entry in mirror.entries() if entry.used]
    return found


def offset_of(root: Path, name: str) -> int:
    location = manifests.open(root).find(name)
    assert location is not None
    return location.offset


# ---- damage ----


def test_a_damaged_piece_is_fetched_once_more(server: FileServer, expected: torch.Tensor, resharded: Path) -> None:
    server.instead = once(flip(HEAD, offset_of(resharded, "lm_head.weight") + 7))
    assert torch.equal(logits(server.url), expected)
    asked = [pair for pair in server.spans[HEAD] if pair[1] - pair[0] > 2_000_000]
    assert len(asked) == 2


def test_what_stays_damaged_is_refused_by_name_and_never_kept(
    server: FileServer, expected: torch.Tensor, resharded: Path, cache: Path
) -> None:
    at = offset_of(resharded, "lm_head.weight") + 7
    server.instead = flip(HEAD, at)
    with pytest.raises(IntegrityError, match=rf"{server.url}/{HEAD}: bytes \d+ to \d+, of lm_head\.weight"):
        logits(server.url)
    assert all(end - begin < 2_000_000 for begin, end in marked(cache).get(HEAD, []))
    mirror = Mirror.open(next(cache.glob(f"states/*/tensors/{HEAD}")))
    assert mirror is not None
    with closing(mirror):
        assert mirror.allocated_bytes() < 100_000, "bytes that nobody will read take the disk's room"
    assert_ledger_is_right(cache)
    assert len([begin for begin, end in server.spans[HEAD] if begin <= at < end]) == 2
    server.instead = no_fault
    assert torch.equal(logits(server.url), expected)


def test_an_expert_that_stays_damaged_ends_the_command(server: FileServer, call: Call, resharded: Path) -> None:
    name = "layers/2/experts/{:02}.safetensors"
    wrong = {name.format(expert): flip(name.format(expert), 4096) for expert in range(64)}
    server.instead = lambda asked, right: wrong.get(asked.name, no_fault)(asked, right)
    result = call("generate", "-m", server.url, "-p", "def ", "-n", "2")
    assert result.exit_code == 13
    assert "model.layers.2.mlp.experts." in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# ---- changes ----


def test_a_new_manifest_is_a_new_state(of_copy: FileServer, copy: Path, expected: torch.Tensor, cache: Path) -> None:
    assert torch.equal(logits(of_copy.url), expected)
    manifest = manifests.open(copy).manifest
    assert len(list((cache / "states").iterdir())) == 1
    save(dataclasses.replace(manifest, documents=manifest.documents[:-1]), copy)
    of_copy.forget()
    assert torch.equal(logits(of_copy.url), expected)
    assert len(list((cache / "states").iterdir())) == 2
    assert of_copy.sent(".safetensors") > 0


def test_original_shards_that_changed_are_another_state(tmp_path: Path, tiny_copy: Path, tiny_checkpoint: Path) -> None:
    with serve(tiny_copy) as server:
        first = logits(server.url)
        shard = tiny_copy / "model-00002-of-000002.safetensors"
        raw = bytearray(shard.read_bytes())
        raw[-40_000:] = raw[-80_000:-40_000]
        shard.write_bytes(raw)
        changed = LoadedModel(tiny_copy, ctx=64).logits(IDS)
        assert not torch.equal(changed, first)
        assert torch.equal(logits(server.url), changed)


@pytest.mark.parametrize("kind", ["resharded", "shards"])
def test_a_file_that_changes_during_the_run_is_refused(kind: str, copy: Path, tmp_path: Path) -> None:
    root = copy if kind == "resharded" else shutil.copytree(demo.path(), tmp_path / "shards")
    with serve(root) as server:
        loaded = LoadedModel(server.url, ctx=64)
        loaded.weights.rows("model.embed_tokens.weight", [1])
        for path in root.rglob("*.safetensors"):
            if kind == "shards" or "embed" not in path.name:
                raw = path.read_bytes()
                path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=r"changed on the server|another sha256"):
            loaded.logits(IDS)


def test_a_file_of_another_size_is_refused(of_copy: FileServer, copy: Path) -> None:
    loaded = LoadedModel(of_copy.url, ctx=64)
    path = copy / "model" / "embed.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(IntegrityError, match="bytes there, expected"):
        loaded.logits(IDS)


def test_a_file_that_is_gone_is_named(of_copy: FileServer, copy: Path, call: Call) -> None:
    (copy / HEAD).unlink()
    result = call("generate", "-m", of_copy.url, "-p", "def ", "-n", "2")
    assert result.exit_code == 10
    assert HEAD in result.stderr


@pytest.mark.parametrize("path", ["../../evil.safetensors", "/tmp/evil.safetensors", "a/../../b.safetensors"])
def test_paths_that_lead_out_of_the_cache_are_refused(path: str, of_copy: FileServer, copy: Path, cache: Path) -> None:
    raw = (copy / "manifest.json").read_bytes().replace(b'"model/head.safetensors"', json.dumps(path).encode())
    raw = re.sub(rb'"manifest_sha256":"[0-9a-f]{64}"', b'"manifest_sha256":"' + b"0" * 64 + b'"', raw)
    raw = raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)
    (copy / "manifest.json").write_bytes(raw)
    with pytest.raises(ManifestError):
        logits(of_copy.url)
    assert not list(cache.rglob("*evil*"))
    assert not (cache.parent / "evil.safetensors").exists()


# ---- connections ----


def test_a_broken_connection_is_taken_up_where_it_broke(server: FileServer, expected: torch.Tensor) -> None:
    name = "model/embed.safetensors"
    server.instead = once(lambda asked, right: right.cut(100_000) if asked.name == name else None, times=2)
    assert torch.equal(logits(server.url), expected)
    (begin, end), *later = server.spans[name]
    assert later == [(begin + 100_000, end), (begin + 200_000, end)]


def test_a_busy_server_is_asked_again(server: FileServer, expected: torch.Tensor) -> None:
    server.instead = once(lambda asked, right: Answer(503) if asked.name == HEAD else None, times=3)
    assert torch.equal(logits(server.url), expected)


def test_a_server_that_goes_away_ends_the_run_and_the_next_goes_on(
    server: FileServer, expected: torch.Tensor, cache: Path, call: Call
) -> None:
    server.instead = lambda asked, right: Answer(503) if asked.name == "layers/3/dense.safetensors" else None
    result = call("logits", "-m", server.url, "--ids", ",".join(map(str, IDS)))
    assert result.exit_code == 1
    assert "layers/3/dense.safetensors: the server answers with status 503" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    before = marked(cache)
    assert before[HEAD] or before["layers/2/dense.safetensors"]
    server.instead = no_fault
    server.forget()
    assert torch.equal(logits(server.url), expected)
    assert_nothing_twice(server, before)


def assert_nothing_twice(server: FileServer, before: dict[str, list[tuple[int, int]]]) -> None:
    """No byte that was there was asked for again."""
    spans = server.spans
    for file, ranges in before.items():
        for begin, end in ranges:
            for asked_begin, asked_end in spans.get(file, []):
                assert asked_end <= begin or asked_begin >= end, file


def test_a_server_without_ranges_is_refused(server: FileServer, resharded: Path) -> None:
    loaded = LoadedModel(server.url, ctx=64)
    server.instead = lambda asked, right: Answer(200, {}, (resharded / asked.name).read_bytes())
    with pytest.raises(RemoteError, match="does not serve ranges"):
        loaded.logits(IDS)


# ---- kills and interrupts ----


def test_killed_in_the_middle_the_next_run_goes_on(server: FileServer, cache: Path, text: bytes) -> None:
    server.pause_s = 0.003
    seen: dict[str, list[tuple[int, int]]] = {}
    for _ in range(3):
        server.forget()
        process = generate(server.url)
        while server.sent(".safetensors") < 1_500_000:
            time.sleep(0.005)
            assert process.poll() is None
        before = marked(cache)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert_nothing_twice(server, seen)
        seen = marked(cache)
        assert all(set(before[file]) <= set(seen[file]) for file in before)
    server.pause_s = 0
    server.forget()
    process = generate(server.url)
    found, errors = process.communicate(timeout=120)
    assert (process.returncode, found) == (0, text), errors
    assert seen
    assert_nothing_twice(server, seen)


def test_an_interrupt_ends_at_once(server: FileServer, cache: Path, text: bytes) -> None:
    server.pause_s = 0.5
    process = generate(server.url)
    while not server.sent(".safetensors"):
        time.sleep(0.01)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert time.monotonic() - begin < 5
    assert b"Traceback" not in errors
    server.pause_s = 0
    before = marked(cache)
    server.forget()
    process = generate(server.url)
    found, errors = process.communicate(timeout=120)
    assert (process.returncode, found) == (0, text), errors
    assert_nothing_twice(server, before)


# ---- two at once ----


def test_two_processes_fetch_everything_once(server: FileServer, text: bytes) -> None:
    server.pause_s = 0.002
    processes = [generate(server.url) for _ in range(2)]
    for process in processes:
        found, errors = process.communicate(timeout=240)
        assert (process.returncode, found) == (0, text), errors
    for file, ranges in server.spans.items():
        if file.endswith(".safetensors"):
            spans = sorted(ranges)
            assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans)), file


def test_the_bound_holds_with_two_processes(server: FileServer, cache: Path, text: bytes, call: Call) -> None:
    refused = call("generate", "-m", server.url, "-p", "a", "--cache-size", "1M")
    least = float(refused.stderr.split("needs ")[1].split(" MB of cache")[0])
    bound = int((least + 0.3) * 1e6)
    processes = [generate(server.url, "--cache-size", str(bound)) for _ in range(2)]
    most = 0
    while any(process.poll() is None for process in processes):
        total = 0
        for path in cache.rglob("*"):
            try:
                total += path.lstat().st_blocks * 512
            except OSError:
                continue  # it went meanwhile
        most = max(most, total)
        time.sleep(0.01)
    for process in processes:
        found, errors = process.communicate()
        assert (process.returncode, found) == (0, text), errors
    assert bound / 2 < most <= bound


def test_evicted_experts_come_again(server: FileServer, call: Call) -> None:
    """A cache of the least size, and texts that need more: every logit is the same."""
    refused = call("generate", "-m", server.url, "-p", "a", "--cache-size", "1M")
    least = int(float(refused.stderr.split("needs ")[1].split(" MB of cache")[0]) * 1e6) + 1
    chance = torch.Generator().manual_seed(3)
    local = LoadedModel(ctx=64)
    for _ in range(4):
        ids = torch.randint(0, 4096, (40,), generator=chance).tolist()
        found = LoadedModel(server.url, ctx=64, cache_size=least).logits(ids)
        assert torch.equal(found, local.logits(ids))
    asked = [(name, pair) for name, pairs in server.spans.items() if "experts" in name for pair in pairs]
    assert len(asked) > len(set(asked)), "nothing was evicted"


def test_threads_of_one_process_share_a_cache(server: FileServer, expected: torch.Tensor, cache: Path) -> None:
    LoadedModel(server.url)  # small files that two write at once are counted twice, until somebody tidies up
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(logits(server.url))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(one, expected) for one in found)
    assert len(server.spans[HEAD]) == len(set(server.spans[HEAD]))
    assert_ledger_is_right(cache)


def assert_ledger_is_right(root: Path) -> None:
    """Nothing stays written down that was not taken."""
    cache = CacheFolder(root)
    assert cache._ledger.bytes == cache._count(keep=None)


def test_a_piece_is_durable_before_it_counts(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    unsynced: dict[Mirror, set[int]] = {}
    write, sync, mark, marks = Mirror.write, Mirror.sync, Mirror.mark, 0

    def logged_write(self: Mirror, view: memoryview, offset: int) -> None:
        unsynced.setdefault(self, set()).add(offset)
        write(self, view, offset)

    def logged_sync(self: Mirror) -> None:
        before = set(unsynced.get(self, ()))
        sync(self)
        unsynced.get(self, set()).difference_update(before)

    def logged_mark(self: Mirror, numbers: range, now: int, *, absent: bool) -> None:
        nonlocal marks
        if absent:
            marks += 1
            entries = self.entries(numbers)
            assert not [at for at in unsynced[self] if entries[0].begin <= at < entries[-1].end]
        mark(self, numbers, now, absent=absent)

    monkeypatch.setattr(Mirror, "write", logged_write)
    monkeypatch.setattr(Mirror, "sync", logged_sync)
    monkeypatch.setattr(Mirror, "mark", logged_mark)
    logits(server.url)
    assert marks > 50


# ---- the disk ----


def test_a_full_disk_is_said_and_what_is_there_stays(
    server: FileServer, cache: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    write, written = os.pwrite, 0

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        if len(data) > 1000:  # not tables
            written += len(data)
            if written > 1_500_000:
                raise OSError(28, "No space left on device")
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        result = call("logits", "-m", server.url, "--ids", ",".join(map(str, IDS)))
    assert result.exit_code == ResourceError.exit_code
    assert "No space left" in result.stderr
    assert "--cache-size" in result.stderr
    before = marked(cache)
    server.forget()
    assert torch.equal(logits(server.url), expected)
    assert_nothing_twice(server, before)


def test_a_mirror_of_another_form_is_made_anew(server: FileServer, cache: Path, expected: torch.Tensor) -> None:
    logits(server.url)
    paths = list(cache.glob("states/*/tensors/layers/1/dense.safetensors"))
    paths[0].write_bytes(b"something else")
    server.forget()
    assert torch.equal(logits(server.url), expected)
    assert [name for name in server.spans if name.endswith(".safetensors")] == ["layers/1/dense.safetensors"]


def test_a_damaged_note_is_asked_for_again(server: FileServer, cache: Path, expected: torch.Tensor) -> None:
    logits(server.url)
    for path in [*cache.glob("places/*"), *cache.glob("states/*/manifest.json")]:
        path.write_bytes(b"{")
        server.forget()
        assert torch.equal(logits(server.url), expected)
        assert list(server.spans) == ["manifest.json"]
