"""Running a checkpoint on a web server: the same logits as from disk, only what is needed, once, and offline."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import Tensor

import manifests
from manifests import hub, patience
from manifests.digest import CHUNK_BYTES
from manifests.errors import RemoteError, SourceNotFoundError, ToolkitError
from runner import demo, fetch_progress
from runner.cache_folder import ENVIRONMENT
from runner.contents import group_of
from runner.fetch_progress import until_first
from runner.loaded import LoadedModel
from tests.file_server import Answer, FileServer, serve
from tests.nginx import needs_nginx, nginx

Call = Callable[..., Result]
IDS = [3, 17, 200, 5, 5, 90]


@pytest.fixture(autouse=True)
def cache(memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, and a server that is gone is noticed at once."""
    return _use(memory_folder / "cache", monkeypatch)


def _use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT, str(folder))
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)  # on a busy disk one may take longer than a test
    return folder


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    tiny_configs: dict[str, dict[str, Any]],
    tiny_weights: Callable[[str], dict[str, Tensor]],
    reshard_folder: Callable[..., Path],
) -> dict[str, Path]:
    """Of every kind: the embedded model in 163 shards, BF16 in two, FP8 in one without an index; and resharded."""
    folder = tmp_path_factory.mktemp("remote")
    single = folder / "fp8"
    single.mkdir()
    save_file(tiny_weights("v3"), single / "model.safetensors")
    (single / "config.json").write_text(json.dumps(tiny_configs["v3"]))
    found = {"demo": demo.path(), "bf16": tiny_checkpoint, "fp8": single}
    resharded = {f"{name}-resharded": reshard_folder(path, folder / f"{name}-r") for name, path in found.items()}
    return found | resharded


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, reshard_folder: Callable[..., Path]) -> Path:
    """A resharded model whose embedding and head are of two chunks each."""
    folder = tmp_path_factory.mktemp("wide")
    source = shutil.copytree(tiny_checkpoint, folder / "source")
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 150_000}
    tensors = {name: torch.frombuffer(bytearray(view.data), dtype=torch.bfloat16).view(view.shape)
               for name, view in ((one.name, manifests.open(source).tensor(one.name))
                                  for one in manifests.open(source).tensors()) if view.dtype == "BF16"}  # fmt: skip
    tensors |= {one.name: torch.zeros(one.shape) for one in manifests.open(source).tensors() if one.dtype == "F32"}
    generator = torch.Generator().manual_seed(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn((150_000, 72), generator=generator).to(torch.bfloat16)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    found = reshard_folder(source, folder / "resharded")
    shutil.rmtree(source)
    return found


@pytest.fixture
def start() -> Iterator[Callable[[Path], FileServer]]:
    """Start servers that end with the test."""
    with ExitStack() as servers:
        yield lambda root: servers.enter_context(serve(root))


def logits(path: Path | str, **options: Any) -> Tensor:
    return LoadedModel(path, ctx=64, **options).logits(IDS)


@pytest.mark.parametrize("name", ["demo", "bf16", "fp8", "demo-resharded", "bf16-resharded", "fp8-resharded"])
def test_logits_are_those_from_disk(
    name: str, checkpoints: dict[str, Path], start: Callable[[Path], FileServer]
) -> None:
    server = start(checkpoints[name])
    expected = logits(checkpoints[name])
    assert torch.equal(logits(server.url), expected)
    assert server.most_at_once > 1, "nothing was asked for at the same time"
    server.forget()
    assert torch.equal(logits(server.url), expected)
    # Asked again is the manifest, or a byte of each shard and of the index.
    shards = 0 if name.endswith("resharded") else len(list(checkpoints[name].glob("*.safetensors*")))
    assert server.sent() == shards


@needs_nginx
@pytest.mark.parametrize("name", ["demo", "demo-resharded"])
def test_from_nginx_to_a_disk(
    name: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(tmp_path / "cache", monkeypatch)
    with nginx(checkpoints[name], tmp_path / "nginx") as url:
        expected = logits(checkpoints[name])
        assert torch.equal(logits(url), expected)
        assert torch.equal(logits(url), expected)


def needed_bytes(path: Path, used: set[tuple[int, int]]) -> int:
    """Of all pieces that a text needs: dense groups and experts whole, and the embedding, which is one piece here."""
    checkpoint = manifests.open(path)
    last = checkpoint.config["num_hidden_layers"]
    groups = {f"model.layers.{layer}.mlp.experts.{expert}" for layer, expert in used}
    groups |= {f"model.layers.{layer}" for layer in range(last)} | {"model.norm", "lm_head", "model.embed_tokens"}
    return sum(one.size for one in checkpoint.tensors() if group_of(one.name) in groups)


def greedy(loaded: LoadedModel) -> list[int]:
    ids, sampling = loaded.text.encode("hello"), loaded.sampling(temperature=0.0)
    return list(loaded.engine.generate(ids, max_tokens=4, sampling=sampling, eos_ids=()))


@pytest.mark.parametrize("name", ["demo-resharded", "bf16-resharded"])
def test_what_is_fetched_is_what_is_needed_and_nothing_twice(
    name: str, checkpoints: dict[str, Path], start: Callable[[Path], FileServer]
) -> None:
    server, used = start(checkpoints[name]), set()
    loaded = LoadedModel(server.url, ctx=64, speculate="off")
    loaded.model.observer = lambda layer, chosen: used.update((layer, int(one)) for one in chosen.unique())
    first = greedy(loaded)
    needed = needed_bytes(checkpoints[name], used)
    assert server.sent(".safetensors") == needed
    assert loaded.weights.usage.fetched_bytes == needed
    assert loaded.weights.usage.wait_s >= loaded.weights.usage.fetch_wait_s > 0
    server.forget()
    again = LoadedModel(server.url, ctx=64, speculate="off")
    assert greedy(again) == first
    assert [asked.status for asked in server.asked] == [304]
    assert (again.weights.usage.fetched_bytes, again.weights.usage.fetch_wait_s) == (0, 0.0)


def test_an_expert_in_original_shards_is_fetched_alone(
    checkpoints: dict[str, Path], start: Callable[[Path], FileServer], tmp_path: Path
) -> None:
    """Shards of many experts: what lies between the pieces of chosen ones is not asked for."""
    single = tmp_path / "one-shard"
    single.mkdir()
    source = manifests.open(demo.path())
    tensors = {}
    for one in source.tensors():
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}[one.dtype]
        view = source.tensor(one.name)
        tensors[one.name] = torch.frombuffer(bytearray(view.data), dtype=torch.uint8).view(dtype).view(view.shape)
    save_file(tensors, single / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path() / name, single / name)
    server, used = start(single), set()
    loaded = LoadedModel(server.url, ctx=64, speculate="off")
    loaded.model.observer = lambda layer, chosen: used.update((layer, int(one)) for one in chosen.unique())
    server.forget()
    loaded.logits([3, 17, 200])
    assert len(used) < 3 * 64
    assert server.sent("model.safetensors") == needed_bytes(single, used)


def test_of_the_embedding_only_the_pieces_of_its_rows(wide: Path, start: Callable[[Path], FileServer]) -> None:
    server = start(wide)
    loaded = LoadedModel(server.url, ctx=64)
    size = 150_000 * 72 * 2
    assert CHUNK_BYTES < size < 2 * CHUNK_BYTES
    local = LoadedModel(wide, ctx=64)
    for ids, wanted in (([1, 2, 99], CHUNK_BYTES), ([1, 50], 0), ([149_999], size - CHUNK_BYTES), ([7, 149_000], 0)):
        server.forget()
        found = loaded.weights.rows("model.embed_tokens.weight", ids).weight
        assert torch.equal(found, local.weights.rows("model.embed_tokens.weight", ids).weight)
        assert server.sent() == wanted
    assert torch.equal(loaded.logits([5, 149_998]), local.logits([5, 149_998]))


def test_a_warm_cache_works_without_its_server(
    checkpoints: dict[str, Path],
    call: Call,
    start: Callable[[Path], FileServer],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("demo-resharded", "demo"):
        server = start(checkpoints[name])
        arguments = ("generate", "-m", server.url, "-n", "4", "--temp", "0", "-p")
        first = call(*arguments, "def ")
        assert first.exit_code == 0
        server.stop()
        second = call(*arguments, "def ")
        assert (second.exit_code, second.stdout) == (0, first.stdout), second.stderr
        assert "cannot be reached" in second.stderr
        assert "going on with what the cache has" in second.stderr
        # What another text needs is not there.
        third = call(*arguments, "class Unheard(42): xyzzy " * 4)
        assert third.exit_code == 1
        assert server.url in third.stderr
        assert "Traceback" not in third.stderr
    _use(cache / "another", monkeypatch)
    assert call(*arguments, "def ").exit_code == 1


def test_figures_of_a_run(checkpoints: dict[str, Path], call: Call, start: Callable[[Path], FileServer]) -> None:
    server = start(checkpoints["demo-resharded"])
    result = call("generate", "-m", server.url, "-p", "def ", "-n", "4", "--json")
    stats = json.loads(result.stdout)["stats"]
    assert stats["fetched_bytes"] == server.sent(".safetensors")
    assert stats["wait_s"] >= stats["fetch_wait_s"] > 0
    steps = stats["prefill_tokens"] + 3
    assert stats["fetched_bytes_per_token"] == pytest.approx(stats["fetched_bytes"] / steps)
    assert " fetched " in result.stderr
    assert "speculation is off" in result.stderr
    assert "fetched for each token" in result.stderr
    result = call("eval", "-m", server.url, "-f", __file__, "--ctx", "32", "--json")
    assert json.loads(result.stdout)["fetched_bytes"] > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_fetched_is_shown_until_there_is_text(
    checkpoints: dict[str, Path], start: Callable[[Path], FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(checkpoints["demo-resharded"])
    server.delay_s = 0.05
    monkeypatch.setattr(fetch_progress, "_PAUSE_S", 0.01)
    for path, quiet, is_shown in ((server.url, True, False), (None, False, False), (server.url, False, True)):
        shutil.rmtree(os.environ[ENVIRONMENT], ignore_errors=True)
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        loaded = LoadedModel(path, ctx=64)
        pieces = until_first(loaded.start(IDS, max_tokens=3), loaded, quiet=quiet)
        assert "".join(pieces)
        assert ("fetched" in terminal.getvalue()) == is_shown
    assert "MB" in terminal.getvalue() or "MB/s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r"), "the line is not taken away"
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        (["doctor"], 0),
        (["logits", "-p", "def "], 0),
        (["trace", "-p", "def ", "-n", "2", "--out", "trace.json"], 0),
        (["mtp"], 0),
        (["bench", "-n", "2"], 0),
        (["chat", "-n", "2"], 0),
        (["generate", "-p", "a", "-n", "1", "--io", "mmap"], 1),
        (["generate", "-p", "a", "-n", "1", "--cache-size", "2M"], 15),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_every_command_takes_an_address_or_says_why_not(
    command: list[str],
    exit_code: int,
    checkpoints: dict[str, Path],
    call: Call,
    start: Callable[[Path], FileServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    server = start(checkpoints["demo-resharded"])
    address = f"{server.url.replace('://', '://user:SECRET@')}/?sig=SECRET"
    result = call(command[0], "-m", address, *command[1:], stdin="hello\n")
    assert result.exit_code == exit_code, result.output
    assert "SECRET" not in result.output + result.stderr
    if exit_code:
        assert result.stderr.startswith("runner: ")
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["demo", "demo-resharded"])
def test_a_store_that_forbids_what_it_does_not_have(
    kind: str, checkpoints: dict[str, Path], call: Call, start: Callable[[Path], FileServer]
) -> None:
    server = start(checkpoints[kind])
    server.instead = lambda asked, right: Answer(403) if right.status == 404 else None
    for _ in range(2):
        result = call("logits", "-m", server.url, "-p", "def ")
        assert result.exit_code == 0, result.output


def test_doctor_fetches_no_weights(
    checkpoints: dict[str, Path], call: Call, start: Callable[[Path], FileServer]
) -> None:
    server = start(checkpoints["demo-resharded"])
    result = call("doctor", "-m", server.url)
    assert "can run    yes" in result.stdout
    assert "on a server" in result.stdout
    assert server.sent(".safetensors") == 2, "more than a byte of the first file and of the last"


def test_too_small_a_cache_is_refused_and_names_what_is_enough(
    checkpoints: dict[str, Path], call: Call, start: Callable[[Path], FileServer]
) -> None:
    server = start(checkpoints["demo-resharded"])
    arguments = ("generate", "-m", server.url, "-p", "def ", "-n", "3", "--temp", "0")
    expected = call(*arguments)
    server.forget()
    refused = call(*arguments, "--cache-size", "1M")
    assert refused.exit_code == 15
    least = refused.stderr.split("needs ")[1].split(" of cache")[0]
    # What was there still is: a wrong option frees nothing.
    assert call(*arguments).stdout == expected.stdout
    assert server.sent(".safetensors") == 0
    assert call(*arguments, "--cache-size", least.replace(" ", "")).stdout == expected.stdout


@pytest.mark.parametrize("name", ["demo", "demo-resharded"])
def test_the_least_cache_is_enough_each_time(
    name: str, checkpoints: dict[str, Path], call: Call, start: Callable[[Path], FileServer]
) -> None:
    """Said when nothing was there yet; and a token needs no dense weights anew because of the experts before it."""
    server = start(checkpoints[name])
    arguments = ("generate", "-m", server.url, "-p", "def ", "-n", "3", "--temp", "0")
    least = call(*arguments, "--cache-size", "1M").stderr.split("needs ")[1].split(" of cache")[0].replace(" ", "")
    first = call(*arguments, "--cache-size", least)
    for _ in range(2):
        server.forget()
        again = call(*arguments, "--cache-size", least)
        assert (again.exit_code, again.stdout) == (0, first.stdout)


def test_one_file_is_no_model(checkpoints: dict[str, Path], start: Callable[[Path], FileServer]) -> None:
    with pytest.raises(SourceNotFoundError, match="one file"):
        LoadedModel(start(checkpoints["fp8"]).url + "/model.safetensors")
    with pytest.raises(SourceNotFoundError, match=r"no manifest\.json"):
        LoadedModel(start(checkpoints["fp8"]).url + "/elsewhere")


def test_a_server_without_names_of_states(checkpoints: dict[str, Path], start: Callable[[Path], FileServer]) -> None:
    """No ETag: the manifest is read again, its bytes say that it is the same."""
    server = start(checkpoints["demo-resharded"])
    server.etag = lambda path: None
    first = logits(server.url)
    server.forget()
    assert torch.equal(logits(server.url), first)
    assert list(server.spans) == ["manifest.json"]


def test_a_new_name_for_the_same_state_is_remembered(
    checkpoints: dict[str, Path], start: Callable[[Path], FileServer], tmp_path: Path
) -> None:
    """A server that was set up anew: the manifest is read once more, and not again."""
    root = shutil.copytree(checkpoints["bf16-resharded"], tmp_path / "copy")
    server = start(root)
    first = logits(server.url)
    os.utime(root / "manifest.json", (1, 1))
    for asked in (["manifest.json"], []):
        server.forget()
        assert torch.equal(logits(server.url), first)
        assert list(server.spans) == asked


def test_a_repository_of_the_hub(
    checkpoints: dict[str, Path],
    start: Callable[[Path], FileServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its commit says whether it is the same; nothing else is asked then."""
    root, root_of_next = checkpoints["demo"], tmp_path / "next"
    server = start(root)
    listed = {path.name: hub.Listed(size=path.stat().st_size, sha256=None) for path in root.iterdir()}
    asked = []

    def resolve(text: str) -> hub.Repository:
        asked.append(text)
        return hub.Repository(name=text, url=server.url, file=None, commit="c0", authorization=None, files=listed)

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(hub, "is_offline", lambda _: False)
    expected = logits("hf://org/name")
    server.forget()
    assert torch.equal(logits("hf://org/name"), expected)
    assert (server.sent(), len(asked)) == (0, 2)

    # Another commit with the same files: looked at once.
    shutil.copytree(root, root_of_next, dirs_exist_ok=True)
    following = start(root_of_next.parent)
    server.url = f"{following.url}/next"
    assert torch.equal(logits("hf://org/name"), expected)
    assert following.sent() == len(list(root.glob("*.safetensors*")))
    following.forget()
    assert torch.equal(logits("hf://org/name"), expected)
    assert following.sent() == 0

    def unreachable(text: str) -> hub.Repository:
        raise RemoteError(f"{text}: the Hub cannot be asked")

    monkeypatch.setattr(hub, "resolve", unreachable)
    loaded = LoadedModel("hf://org/name", ctx=64)
    assert torch.equal(loaded.logits(IDS), expected)
    assert "cannot be asked" in str(loaded.offline)
    with pytest.raises(RemoteError, match="not in the cache"):
        loaded.logits(list(range(300, 360)))

    def not_downloaded(text: str) -> Path:
        raise SourceNotFoundError(f"{text}: HF_HUB_OFFLINE is set, and it was not downloaded before")

    monkeypatch.setattr(hub, "is_offline", lambda _: True)
    monkeypatch.setattr(hub, "downloaded", not_downloaded)
    assert torch.equal(logits("hf://org/name"), expected)
    with pytest.raises(RemoteError, match="HF_HUB_OFFLINE"):
        LoadedModel("hf://org/other")


def test_a_cache_that_cannot_be_made_is_named(
    checkpoints: dict[str, Path],
    start: Callable[[Path], FileServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "file" / "below"))
    with pytest.raises(ToolkitError, match=ENVIRONMENT):
        LoadedModel(start(checkpoints["fp8"]).url)


def test_an_unused_server_is_closed_behind_a_block(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        url = server.url
    with pytest.raises(RemoteError, match="cannot be reached"):
        LoadedModel(url)


@pytest.mark.parametrize("name", ["demo-resharded", "bf16"])
def test_a_page_of_somebody_in_between_is_no_answer(
    name: str, checkpoints: dict[str, Path], start: Callable[[Path], FileServer]
) -> None:
    """As a network sends before it lets one in: what is in the cache is used, and that is said."""
    server = start(checkpoints[name])
    expected = logits(server.url)
    server.instead = lambda asked, right: Answer(200, {"Content-Type": "text/html"}, b"<html>Welcome</html>")
    loaded = LoadedModel(server.url, ctx=64)
    assert "the server sends a web page in its place" in str(loaded.offline)
    assert torch.equal(loaded.logits(IDS), expected)
