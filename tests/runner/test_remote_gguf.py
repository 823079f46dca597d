"""Running GGUF models on a web server: the logits of the file here, its headers and pieces fetched once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor

from manifests import patience
from manifests.errors import IntegrityError, SourceNotFoundError
from runner.cache_folder import ENVIRONMENT
from runner.loaded import LoadedModel
from tests.fake_hub import NAME, fake_hub
from tests.file_server import FileServer, serve
from tests.gguf_files import write_model
from tests.gguf_tokenizers import TRAINING, add_tokenizer, train
from tests.runner.test_gguf_model import KINDS, SIZES

Call = Callable[..., Result]
IDS = [3, 17, 200, 5, 5, 90]


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, reference: SimpleNamespace, tiny_configs: dict[str, dict[str, Any]]
) -> Path:
    """The same model as one file and as a set, with a tokenizer."""
    published = {key: value for key, value in tiny_configs["v3"].items() if key != "quantization_config"}
    config = published | SIZES | {"q_lora_rank": 96, "vocab_size": 1300, "bos_token_id": 0, "eos_token_id": 1}
    weights = {name: tensor.float().numpy() for name, tensor in reference.tiny.make_weights(config, None).items()}
    tokenizer = train("deepseek-v3", TRAINING)
    folder = tmp_path_factory.mktemp("models")
    for name, options in (("one", {}), ("set", {"split_max_tensors": 20})):
        source = tmp_path_factory.mktemp("source") / "tokenizer"
        (folder / name).mkdir()
        write_model(
            folder / name / "m.gguf",
            config,
            weights,
            KINDS["K"],
            tokenizer=lambda writer, source=source: add_tokenizer(writer, source, tokenizer, "deepseek-v3", rows=1300),
            **options,
        )
    return folder


@pytest.fixture
def server(models: Path, memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """The models on a server, and an empty cache."""
    monkeypatch.setenv(ENVIRONMENT, str(memory_folder / "cache"))
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("manifests.gguf.READ_BYTES", 4096)
    monkeypatch.setattr("manifests.gguf_files.READ_BYTES", 4096)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)  # on a busy disk one may take longer than a test
    with serve(models) as found:
        yield found


def logits(path: Path | str) -> Tensor:
    return LoadedModel(path, ctx=64).logits(IDS)


def parts(models: Path) -> list[str]:
    return sorted(path.name for path in (models / "set").iterdir())


@pytest.mark.parametrize("kind", ["one", "set"])
def test_logits_and_ids_are_those_from_disk(server: FileServer, models: Path, kind: str) -> None:
    names = parts(models) if kind == "set" else ["m.gguf"]
    url = f"{server.url}/{kind}/{names[-1]}"
    expected = logits(models / kind / names[0])
    assert expected.std() > 1
    loaded = LoadedModel(url, ctx=64)
    assert loaded.name == f"{server.url}/{kind}"
    assert torch.equal(loaded.logits(IDS), expected)
    spans = server.spans[f"{kind}/{names[0]}"]
    assert len(set(spans)) == len(spans), "its header was fetched twice"
    text = "def quicksort(values):"
    assert LoadedModel(url).text.encode(text) == LoadedModel(models / kind / names[0]).text.encode(text)
    # Whichever file of the set it is named by, and however often: nothing is fetched but to ask whether it is the same.
    server.forget()
    assert torch.equal(logits(url), expected)
    assert server.sent(".gguf") == len(names)
    assert not [asked.path for asked in server.asked if "index" in asked.path]


def test_experts_that_nobody_chose_are_not_fetched(server: FileServer, models: Path) -> None:
    LoadedModel(f"{server.url}/one/m.gguf", ctx=64).logits(IDS[:1])
    assert 0 < server.sent(".gguf") < (models / "one" / "m.gguf").stat().st_size * 0.8


def test_small_files_beside_it_are_asked_for_once_in_a_run(server: FileServer) -> None:
    for _ in range(2):
        server.forget()
        assert LoadedModel(f"{server.url}/one/m.gguf", ctx=64).generate("def f(", max_tokens=1) is not None
        asked = Counter(asked.path for asked in server.asked if asked.status == 404)
        assert asked["/one/tokenizer.json"] == 1
        assert max(asked.values()) == 1


def test_it_runs_without_the_server(server: FileServer, models: Path) -> None:
    url = f"{server.url}/set/{parts(models)[1]}"
    expected = logits(url)
    ids = LoadedModel(url).text.encode("import os")
    server.stop()
    loaded = LoadedModel(url, ctx=64)
    assert loaded.offline is not None
    assert torch.equal(loaded.logits(IDS), expected)
    assert loaded.text.encode("import os") == ids


@pytest.mark.parametrize("change", [lambda raw: raw[:-9], lambda raw: raw[:99] + b"!" + raw[100:], lambda raw: b""])
def test_a_damaged_header_in_the_cache_is_fetched_again(
    server: FileServer, models: Path, change: Callable[[bytes], bytes]
) -> None:
    url = f"{server.url}/one/m.gguf"
    expected = logits(url)
    (header,) = Path(os.environ[ENVIRONMENT]).glob("states/*/headers/m.gguf")
    header.write_bytes(change(header.read_bytes()))
    assert torch.equal(logits(url), expected)
    assert LoadedModel(url).text.encode("a b") == LoadedModel(models / "one" / "m.gguf").text.encode("a b")
    server.stop()
    assert torch.equal(logits(url), expected)


def test_another_file_of_the_same_name_is_another_state(server: FileServer, models: Path, tmp_path: Path) -> None:
    """Between runs it is run; during one it is refused."""
    url, path = f"{server.url}/one/m.gguf", models / "one" / "m.gguf"
    raw, now = path.read_bytes(), path.stat()
    expected = logits(url)
    changed = bytearray(raw)
    changed[-1] ^= 1
    try:
        path.write_bytes(changed)
        loaded = LoadedModel(url, ctx=64)
        assert len(list(Path(os.environ[ENVIRONMENT]).glob("states/*"))) == 2
        path.write_bytes(raw)
        os.utime(path, ns=(now.st_mtime_ns + 10**9, now.st_mtime_ns + 10**9))
        with pytest.raises(IntegrityError, match="changed on the server since it was first read"):
            loaded.logits(IDS)
    finally:
        path.write_bytes(raw)
        os.utime(path, ns=(now.st_mtime_ns, now.st_mtime_ns))
    server.forget()
    assert torch.equal(logits(url), expected)


def test_on_the_hub(server: FileServer, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(models / "one" / "m.gguf")
    with fake_hub(models, server.url, monkeypatch):
        assert torch.equal(logits(f"{NAME}/one/m.gguf"), expected)
        assert torch.equal(logits(f"{NAME}/set"), expected)
        server.forget()
        assert torch.equal(logits(f"{NAME}/set"), expected)
        assert server.sent() == 0, "the commit is the same"


def test_what_is_not_there(server: FileServer, models: Path) -> None:
    url, names = f"{server.url}/set", parts(models)
    with pytest.raises(SourceNotFoundError, match=rf"^{url}/none\.gguf: the server has no such file$"):
        LoadedModel(f"{url}/none.gguf")
    missing = f"2 of 3 files of a split model are missing, first {names[1]}"
    some = {f"/{name}": (models / "set" / name).read_bytes() for name in names[:1]}
    with serve(some) as part, pytest.raises(SourceNotFoundError, match=missing):
        LoadedModel(f"{part.url}/{names[0]}")


def test_from_the_command_line(server: FileServer, call: Call) -> None:
    secret = server.url.replace("http://", "http://me:secret@")
    result = call("generate", "-m", f"{secret}/one/m.gguf", "-p", "def f(", "-n", "2", "--json")
    assert result.exit_code == 0, result.stderr
    assert '"fetched_bytes"' in result.stdout
    refused = call("generate", "-m", f"{secret}/one/m.txt", "-p", "x")
    assert refused.exit_code == 10
    assert "secret" not in result.stdout + result.stderr + refused.stderr
