"""Checkpoints on a web server are seen as the same ones here are, with nothing read but headers and small files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

import manifests
from manifests import hub, remote
from manifests.errors import IntegrityError, ManifestError, RemoteError, SourceNotFoundError
from tests.fake_hub import COMMIT, FakeHub, fake_hub
from tests.file_server import Answer, Asked, FileServer, no_fault, serve

INDEX = "model.safetensors.index.json"
Program = Callable[..., Any]


def contents(folder: Path, below: str = "") -> dict[str, bytes]:
    """The files of a folder by the path that a server gives them."""
    return {
        f"{below}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def served(v3_folder: Path, v3_resharded: Path) -> Iterator[FileServer]:
    with serve(contents(v3_folder, "/plain") | contents(v3_resharded, "/ours")) as server:
        yield server


@pytest.fixture
def server(served: FileServer) -> Iterator[FileServer]:
    served.forget()
    files = dict(served.files)
    yield served
    served.files = files
    served.instead = no_fault


@pytest.fixture(params=["plain", "ours"])
def pair(request: pytest.FixtureRequest, server: FileServer, v3_folder: Path, v3_resharded: Path) -> tuple[str, Path]:
    """An address and the folder that lies there."""
    return f"{server.url}/{request.param}", v3_folder if request.param == "plain" else v3_resharded


def test_the_same_manifest_config_and_bytes(pair: tuple[str, Path], v3_bytes: dict[str, bytes]) -> None:
    there, here = manifests.open(pair[0]), manifests.open(pair[1])
    assert there.manifest == here.manifest
    assert there.config == here.config
    assert there.layers == here.layers
    for location in there.tensors():
        assert location.place == f"{pair[0]}/{location.file}"
        assert there.tensor(location.name).data == v3_bytes[location.name]
    assert {name: view.data for name, view in there.expert(2, 1).items()} == {
        name: view.data for name, view in here.expert(2, 1).items()
    }


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_commands_say_the_same(pair: tuple[str, Path], slash: str, program: Program) -> None:
    for command in ("show", "ls"):
        rows = program("manifests", command, pair[0] + slash, "--json").json
        expected = program("manifests", command, pair[1], "--json").json
        if command == "ls":
            for row in rows:
                assert row["place"] == f"{pair[0]}/{row['file']}"
                row["place"] = str(pair[1] / row["file"])
        else:
            expected["path"] = pair[0] + slash
        assert rows == expected
    text = program("manifests", "ls", pair[0], "--layer", "2", "--expert", "1").out
    assert f" {pair[0]}/" in text
    assert program("manifests", "diff", pair[0], pair[1]).code == (0 if pair[0].endswith("ours") else 3)


def test_headers_alone_are_read(server: FileServer, v3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifests.shards.FIRST_BYTES", 64)
    shards = {location.file for location in manifests.open(v3_folder).tensors()}
    server.forget()
    manifests.open(f"{server.url}/plain")
    for shard in shards:
        ranges = [asked.range for asked in server.asked if asked.path == f"/plain/{shard}"]
        header = 8 + int.from_bytes((v3_folder / shard).read_bytes()[:8], "little")
        assert ranges == ["bytes=0-63", f"bytes=64-{header - 1}"]
    assert {asked.path for asked in server.asked if asked.range is None} == {
        "/plain/manifest.json", f"/plain/{INDEX}", "/plain/config.json"
    }  # fmt: skip


def test_one_request_is_enough_for_a_header(server: FileServer, v3_folder: Path) -> None:
    manifests.open(f"{server.url}/plain")
    shards = len(list(v3_folder.glob("model-*.safetensors")))
    assert len([asked for asked in server.asked if asked.range]) == shards


def test_progress_is_told(server: FileServer) -> None:
    told: list[tuple[int, int]] = []
    manifests.open(f"{server.url}/plain", lambda done, total: told.append((done, total)))
    count = told[0][1]
    assert told == [(number, count) for number in range(1, count + 1)]


def test_one_file(server: FileServer, v3_folder: Path, program: Program) -> None:
    shard = sorted(v3_folder.glob("model-*.safetensors"))[0]
    url = f"{server.url}/plain/{shard.name}"
    rows = program("manifests", "ls", url, "--json").json
    assert [row["place"] for row in rows] == [url] * len(rows)
    assert len(rows) == len(program("manifests", "ls", shard, "--json").json)


def test_a_checkpoint_of_one_file_without_an_index(server: FileServer, v3_folder: Path) -> None:
    shard = sorted(v3_folder.glob("model-*.safetensors"))[0]
    server.files["/one/model.safetensors"] = shard.read_bytes()
    assert len(list(manifests.open(f"{server.url}/one").tensors())) == len(list(manifests.open(shard).tensors()))


@pytest.mark.parametrize(
    ("path", "code", "says"),
    [
        (
            "/nothing",
            10,
            "/nothing: no manifest.json, no model.safetensors.index.json and no model.safetensors there; "
            "of a GGUF model give the address of the file",
        ),
        ("/plain/none.safetensors", 10, "/plain/none.safetensors: the server has no such file"),
    ],
)
def test_nothing_there(server: FileServer, program: Program, path: str, code: int, says: str) -> None:
    result = program("manifests", "show", server.url + path)
    assert (result.code, result.out) == (code, "")
    assert result.err == f"manifests: {server.url}{says}\n"


@pytest.mark.parametrize("url", ["file:///models", "ftp://host/a", "s3://bucket/a"])
def test_other_schemes_are_refused(program: Program, url: str) -> None:
    result = program("manifests", "ls", url)
    assert (result.code, result.out) == (10, "")
    assert result.err.startswith(f"manifests: {url}: cannot be read; ")


def test_a_missing_shard(server: FileServer, program: Program, v3_folder: Path) -> None:
    shard = sorted(v3_folder.glob("model-*.safetensors"))[1].name
    del server.files[f"/plain/{shard}"]
    result = program("manifests", "show", f"{server.url}/plain")
    assert (result.code, result.err) == (10, f"manifests: {server.url}/plain/{shard}: the server has no such file\n")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "http://evil/x.safetensors", "a\\b.safetensors", "a//b.safetensors"]
)
def test_hostile_names_of_an_index(server: FileServer, program: Program, name: str) -> None:
    index = json.loads(server.files[f"/plain/{INDEX}"])
    index["weight_map"]["model.norm.weight"] = name
    server.files[f"/plain/{INDEX}"] = json.dumps(index).encode()
    result = program("manifests", "show", f"{server.url}/plain")
    assert result.code == 12
    assert "refused" in result.err
    assert not [asked for asked in server.asked if "x.safetensors" in asked.path]


def test_a_hostile_path_of_a_manifest(server: FileServer, program: Program) -> None:
    server.files["/ours/manifest.json"] = server.files["/ours/manifest.json"].replace(b"model/head", b"../../head")
    assert program("manifests", "show", f"{server.url}/ours").code == 12


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "shorter than 8 bytes"),
        (b"version https://git-lfs", "git-lfs pointer"),
        (b"\xff" * 64, "over the limit"),
        ((10**6).to_bytes(8, "little") + b"{}", "longer than the file"),
        (b"<html>not found</html>", "over the limit"),
        ((2).to_bytes(8, "little") + b"[]", "not a safetensors file"),
    ],
)
def test_what_is_no_shard(server: FileServer, program: Program, content: bytes, says: str) -> None:
    server.files["/a.safetensors"] = content
    result = program("manifests", "ls", f"{server.url}/a.safetensors")
    assert result.code == 12
    assert says in result.err


def test_a_manifest_of_another_file_than_it_says(server: FileServer) -> None:
    server.files["/ours/manifest.json"] = server.files["/ours/manifest.json"].replace(b"bos", b"eos", 1) + b" "
    with pytest.raises(ManifestError):
        manifests.open(f"{server.url}/ours")


def test_a_shard_that_changes_between_two_looks(server: FileServer, v3_folder: Path) -> None:
    checkpoint = manifests.open(f"{server.url}/plain")
    location = next(one for one in checkpoint.tensors() if one.size)
    server.files[f"/plain/{location.file}"] += b"more"
    with pytest.raises(IntegrityError, match="changed on the server"):
        _ = checkpoint.tensor(location.name).data


def test_a_server_without_ranges(server: FileServer, program: Program) -> None:
    def whole(asked: Asked, right: Answer) -> Answer | None:
        return Answer(200, {}, server.files[asked.path]) if asked.range else None

    server.instead = whole
    result = program("manifests", "ls", f"{server.url}/plain")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "does not serve ranges" in result.err
    # What is read whole needs none.
    assert program("manifests", "ls", f"{server.url}/ours").code == 0


def test_what_needs_files_here_says_so(server: FileServer) -> None:
    checkpoint = manifests.open(f"{server.url}/ours")
    for needs in (lambda: checkpoint.root, lambda: checkpoint.path("manifest.json")):
        with pytest.raises(SourceNotFoundError, match=r"/ours: is not on this machine, and this needs its files"):
            needs()


def test_files_are_checked(server: FileServer, program: Program) -> None:
    url = f"{server.url}/ours"
    result = program("manifests", "check", url)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith(" files, sizes and headers are right\n")
    gone, short, other = [name for name in sorted(server.files) if name.startswith("/ours/layers/")][:3]
    del server.files[gone]
    server.files[short] = server.files[short][:-1]
    server.files[other] = server.files[other].replace(b"F32", b"I32", 1).replace(b"BF16", b"FP16", 1)
    result = program("manifests", "check", url)
    assert result.code == 13
    assert [line.partition(": ")[0] for line in result.out.splitlines()] == [
        name.removeprefix("/ours/") for name in (gone, short, other)
    ]
    assert [line.partition(": ")[2].split(",")[0] for line in result.out.splitlines()] == [
        "the server has no such file",
        f"has {len(server.files[short])} bytes",
        "its header is not the one the manifest describes",
    ]


def test_a_password_in_an_address(server: FileServer, program: Program) -> None:
    url = server.url.replace("http://", "http://me:secret@")
    result = program("manifests", "show", f"{url}/none")
    assert result.code == 10
    assert "secret" not in result.err
    assert {asked.headers["authorization"] for asked in server.asked} == {"Basic bWU6c2VjcmV0"}


# The Hub.


@pytest.fixture
def hub_server(
    server: FileServer, v3_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FakeHub]:
    """A Hub whose large files are on another host."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with fake_hub(v3_folder, f"{server.url}/plain", monkeypatch) as front:
        front.published = lambda path: "ab" * 32
        yield front


@pytest.mark.parametrize("name", ["hf://org/tiny", "hf://org/tiny@v1", "hf://org/tiny/", "hf://models/org/tiny@main"])
def test_a_repository_of_the_hub(hub_server: FakeHub, server: FileServer, v3_folder: Path, name: str) -> None:
    checkpoint = manifests.open(name)
    assert checkpoint.manifest == manifests.open(v3_folder).manifest
    assert str(checkpoint.folder) == name.rstrip("/")
    assert isinstance(checkpoint.folder, remote.RemoteFolder)
    assert checkpoint.folder.files is not None
    listed = checkpoint.folder.files
    shard = sorted(v3_folder.glob("model-*.safetensors"))[0]
    assert listed[shard.name] == hub.Listed(size=shard.stat().st_size, sha256="ab" * 32)
    assert listed["config.json"].sha256 is None
    # The token is the Hub's and not its file servers'.
    ours = [asked for asked in hub_server.asked if "/org/" in asked.path]
    assert {asked.headers.get("authorization") for asked in ours} == {"Bearer hf_secret"}
    assert {asked.headers.get("authorization") for asked in server.asked} == {None}


def test_a_folder_of_a_repository(hub_server: FakeHub, v3_folder: Path) -> None:
    found = hub.resolve("hf://org/tiny/figures/deep")
    assert found.url.endswith(f"/org/tiny/resolve/{COMMIT}/figures/deep")
    assert list(found.files) == ["benchmark 1.txt"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf://org/none", "the Hub has no such repository"),
        ("hf://org/tiny@none", "the Hub has no such revision"),
        ("hf://tiny", "is no repository"),
        ("hf://", "is no repository"),
        ("hf://org/-bad-", "is no name that a repository can have"),
    ],
)
def test_no_such_repository(hub_server: FakeHub, program: Program, name: str, says: str) -> None:
    result = program("manifests", "show", name)
    assert (result.code, result.out, result.err.count("\n")) == (10, "", 1)
    assert says in result.err


def test_the_hub_cannot_be_asked(hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_server.instead = lambda asked, right: Answer(500)
    with pytest.raises(
        RemoteError, match=r"hf://org/tiny: the Hub cannot be asked: .*; with HF_HUB_OFFLINE=1 what was"
    ):
        manifests.open("hf://org/tiny")


def test_offline_a_download_is_used(
    hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch, v3_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceNotFoundError, match="HF_HUB_OFFLINE is set, and it was not downloaded before"):
        manifests.open("hf://org/tiny")
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text(COMMIT)
    snapshot.symlink_to(v3_folder)
    assert manifests.open("hf://org/tiny").manifest == manifests.open(v3_folder).manifest
    assert not hub_server.asked


def test_without_the_hubs_package(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    result = program("manifests", "show", "hf://org/tiny")
    assert result.code == 1
    assert "pip install 'expert-reshard[hub]'" in result.err


# Servers that say less than they know.


@pytest.mark.parametrize("status", [401, 403])
def test_what_must_not_be_seen_may_be_absent(
    server: FileServer, v3_folder: Path, program: Program, tmp_path: Path, status: int
) -> None:
    """A store that does not let its list be read says 403 of all that it does not have."""
    server.instead = lambda asked, right: Answer(status, {}, b"<Error>") if right.status == 404 else None
    url = f"{server.url}/plain"
    assert manifests.open(url).manifest == manifests.open(v3_folder).manifest
    assert program("manifests", "show", url).code == 0
    assert program("reshard", "plan", url).code == 0
    assert program("reshard", "run", url, tmp_path / "out").code == 0
    assert program("reshard", "verify", tmp_path / "out", "--against", url).code == 0


def test_a_refusal_names_both_reasons(server: FileServer, program: Program) -> None:
    server.instead = lambda asked, right: Answer(403)
    for command in (["manifests", "ls"], ["reshard", "plan"]):
        result = program(*command, f"{server.url}/plain?sig=secret")
        assert result.code == 10
        assert "no manifest.json, no model.safetensors.index.json and no model.safetensors there, or you" in result.err
        assert "does not let you read it (status 403)" in result.err
        assert "secret" not in result.err
        assert result.err.count("\n") == 1


def test_a_shard_that_must_not_be_seen_is_refused(server: FileServer, program: Program, tmp_path: Path) -> None:
    server.instead = lambda asked, right: Answer(403) if "00009" in asked.path else None
    for command in (["manifests", "ls"], ["reshard", "plan"]):
        result = program(*command, f"{server.url}/plain")
        assert result.code == 10
        assert "model-00009-of-000047.safetensors: the server does not let you read it (status 403)" in result.err


def test_a_document_that_must_not_be_seen_is_called_so(
    server: FileServer, v3_resharded: Path, program: Program
) -> None:
    server.instead = lambda asked, right: Answer(403) if asked.path.endswith("LICENSE") else None
    result = program("reshard", "verify", v3_resharded, "--against", f"{server.url}/plain")
    assert result.code == 13
    assert "LICENSE: bytes 0-" in result.out
    assert "does not let you read it (status 403)" in result.out


def test_nothing_shows_what_is_secret_in_an_address(
    pair: tuple[str, Path], server: FileServer, program: Program
) -> None:
    addresses = (pair[0].replace("://", "://user:SECRET@"), f"{pair[0]}/?sig=SECRET", f"{server.url}/none?sig=SECRET")
    for address in addresses:
        for arguments in (
            ["show"], ["show", "--json"], ["ls"], ["ls", "--json"], ["ls", "--match", "none"], ["check"],
            ["check", "--json"],
        ):  # fmt: skip
            result = program("manifests", arguments[0], address, *arguments[1:])
            assert result.code == (10 if "none?" in address else 0)
            assert "SECRET" not in result.out + result.err
    assert "SECRET" not in program("manifests", "ls", f"{server.url}x/?sig=SECRET").err


def test_one_signed_file(server: FileServer, v3_folder: Path, program: Program) -> None:
    shard = sorted(v3_folder.glob("model-*.safetensors"))[0]
    url = f"{server.url}/plain/{shard.name}"
    rows = program("manifests", "ls", f"{url}?sig=SECRET", "--json").json
    assert {row["place"] for row in rows} == {url}
    refused = program("reshard", "plan", f"{url}?sig=SECRET")
    assert refused.code == 10
    assert "is not a checkpoint; give the address of the folder" in refused.err


def test_words_of_a_server_do_not_drive_a_terminal(monkeypatch: pytest.MonkeyPatch, program: Program) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("\x1b[2Jno\x07")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    result = program("manifests", "ls", "hf://org/name")
    assert result.code == 1
    assert result.err.rstrip("\n").isprintable()


def test_web_pages_in_place_of_what_is_absent(server: FileServer, program: Program, tmp_path: Path) -> None:
    """Some servers have a page, and status 200, for whatever they have not."""
    page = b"\n<!DOCTYPE html><title>Where is it?</title>"
    server.instead = lambda asked, right: Answer(200, {}, page) if right.status == 404 else None
    for command in (["manifests", "show"], ["reshard", "plan"]):
        result = program(*command, f"{server.url}/nothing")
        assert result.code in (1, 10)
        assert "already resharded" not in result.err
        assert result.err.count("\n") == 1
    # The file of a checkpoint without an index is asked for by range, and a page is none.
    assert "/nothing/model.safetensors" in result.err
    assert manifests.open(f"{server.url}/plain").config["model_type"] == "deepseek_v3"
    server.files = {path: raw for path, raw in server.files.items() if not path.endswith("/config.json")}
    assert manifests.open(f"{server.url}/plain").config == {}


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors.index.json", "config.json"])
def test_the_address_of_a_document_leads_to_its_folder(server: FileServer, program: Program, name: str) -> None:
    result = program("manifests", "show", f"{server.url}/plain/{name}?sig=secret")
    expected = (
        f"manifests: {server.url}/plain/{name}: is one file of a checkpoint; give its folder, {server.url}/plain\n"
    )
    assert (result.code, result.err) == (10, expected)


def test_a_page_to_log_in_is_called_one(server: FileServer, program: Program) -> None:
    page = b"\r\n<!doctype html><title>Sign in</title>"
    server.instead = lambda asked, right: Answer(200, {"Content-Type": "text/html"}, page)
    for command in (["manifests", "ls"], ["reshard", "plan"]):
        result = program(*command, f"{server.url}/plain")
        assert result.code == 1
        place = f"{server.url}/plain/model.safetensors"
        assert result.err.endswith(f": {place}: the server sends a web page in its place; it may want you to log in\n")
