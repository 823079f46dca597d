"""The parsers under test, and what must hold for every input that one of them accepts.

Each target takes an `Input`, returns when the product accepts it, and raises a `ToolkitError` when the product refuses
it. Any other exception is a finding; an `AssertionError` says that something wrong was accepted. The checks are a
second reading of FORMAT.md and of the docstrings; they share no code with what they check.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import documents
import gguf_bytes
import gguf_inputs
import jsonschema
import zstandard
from inputs import FOLDERS, Input
from promises import (
    SMALL,
    accepted,
    check_error,
    check_gguf,
    check_gguf_again,
    check_header,
    check_manifest,
    check_part,
    check_plan,
    check_safe,
    without_defaults,
)

from manifests import inventory
from manifests.check import check_files
from manifests.cli import manifests as program
from manifests.config import model_facts, read_config
from manifests.errors import SourceNotFoundError, ToolkitError, UnsupportedModelError
from manifests.folder import LocalFolder
from manifests.gguf import GgufHeader, parse_gguf, read_gguf
from manifests.header import parse_header, read_header
from manifests.json_schema import json_schema
from manifests.names import Role, expert_prefix, parse_name
from manifests.paths import Widths, format_path, parse_path, place_of
from manifests.safety import check_relative, relative_fault
from manifests.schema import FileEntry, Selection
from manifests.storage import decode, encode, save
from manifests.summary import diff
from reshard.archive import unpack
from reshard.journal import read_begin, read_journal
from reshard.plan import make_plan
from reshard.source import read_source
from runner.config import ModelConfig

INDEX = "model.safetensors.index.json"


class Targets:
    """The targets, with the folders they read from."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._allowed: Path | None = None
        # What a path that leaves a folder leads to.
        (scratch / "outside.safetensors").write_bytes(documents.frame_header(b"{}"))
        self._folders = [self._make_folder(number) for number in range(FOLDERS)]
        for name in ("file", "config", "journal", "resharded", "saved", "gguf", "split"):
            (self._scratch / name).mkdir()
        for number in range(2):
            self._restore_part(number)
        self._validator = jsonschema.Draft202012Validator(json_schema())

    def run(self, given: Input) -> None:
        """Give an input to its target.

        Raises:
            ToolkitError: It was refused, as it may be.
            Exception: Anything else is a finding.
        """
        target: Callable[[Input], None] = getattr(self, f"_{given.target}")
        try:
            target(given)
        except ToolkitError as error:
            check_error(error)
            raise

    def watch(self) -> None:
        """From now on, end at any file that the product opens outside of its folder, and at any that it changes.

        A hook of the interpreter, which cannot be taken away again: for processes that do nothing else.
        """
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._allowed is None or event.partition(".")[0] not in ("open", "os", "shutil"):
            return
        if event == "open":
            path, mode, flags = arguments
            # A number is a file that was opened before, and what Python itself opens is the module of a late import.
            if isinstance(path, int) or (path := os.fsdecode(path)).endswith((".py", ".pyc", ".so")):
                return
            changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if mode is None else set(mode) & set("wax+")
            assert not changes, f"opened {path} for writing"
            assert Path(os.path.realpath(path)).is_relative_to(self._allowed), (
                f"opened {path}, outside of {self._allowed}"
            )
        elif event not in ("os.listdir", "os.scandir", "os.walk"):
            raise AssertionError(f"{event} {arguments}")

    @contextlib.contextmanager
    def _only_reading(self, folder: Path) -> Iterator[None]:
        self._allowed = folder
        try:
            yield
        finally:
            self._allowed = None

    # Headers.

    def _header(self, given: Input) -> None:
        header = parse_header(given.data, file_bytes=given.extra["size"], what="x")
        with accepted():
            check_header(header, given.data)

    def _header_file(self, given: Input) -> None:
        path = self._scratch / "file" / "model.safetensors"
        _write_sparse(path, given.data, given.extra["size"])
        with self._only_reading(path.parent):
            header = read_header(path)
            with accepted():
                opened = inventory.open(path)
        with accepted():
            check_header(header, given.data)
            check_manifest(opened.manifest)

    # GGUF files.

    def _gguf(self, given: Input) -> None:
        size = given.extra["size"]
        header = parse_gguf(given.data, file_bytes=size, what="x")
        with accepted():
            check_gguf(header, given.data)
            if size < SMALL and given.number % 8 == 0:
                path = self._scratch / "gguf" / "again.bin"
                _write_sparse(path, given.data, size)
                check_gguf_again(header, path)

    def _gguf_file(self, given: Input) -> None:
        """A model of one file, or of two of which one was changed."""
        name = given.extra["file"]
        is_part = name in gguf_inputs.PARTS
        folder = self._scratch / ("split" if is_part else "gguf")
        path = folder / name
        try:
            _write_sparse(path, given.data, given.extra["size"])
            with self._only_reading(folder):
                checkpoint = inventory.open(folder if is_part or given.number % 2 else path)
                with accepted():
                    self._check_gguf_checkpoint(checkpoint, given)
        finally:
            if is_part:
                self._restore_part(gguf_inputs.PARTS.index(name))

    def _check_gguf_checkpoint(self, checkpoint: inventory.Checkpoint, given: Input) -> None:
        check_manifest(checkpoint.manifest)
        for file in checkpoint.manifest.files:
            header = read_gguf(checkpoint.root / file.path)
            if file.path == given.extra["file"]:
                check_gguf(header, given.data)
            self._check_cover(file, header)
        for location in checkpoint.tensors():
            assert (location.shape == location.logical_shape) == (location.encoding == "plain" or not location.shape)
        with contextlib.suppress(ToolkitError):
            config = checkpoint.config
            json.dumps(config, allow_nan=False)
            ModelConfig.from_dict(config)
        if given.number % 16 == 0:
            for command in ("show", "ls", "check"):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    program.main([command, str(checkpoint.root / given.extra["file"])], standalone_mode=False)

    @staticmethod
    def _check_cover(file: FileEntry, header: GgufHeader) -> None:
        """Every byte of every tensor of the file is described once."""
        entries = list(file.tensors)
        for tensor in header.tensors:
            position = tensor.begin
            while position < tensor.end:
                entry = entries.pop(0)
                assert (entry.offset, entry.source_name) == (position, tensor.name)
                assert entry.encoding == ("plain" if tensor.type.dtype else tensor.type.name)
                position += entry.size
            assert position == tensor.end
        assert not entries

    def _restore_part(self, number: int) -> None:
        tree = gguf_inputs.split_set()[number]
        data = gguf_bytes.header(tree)
        path = self._scratch / "split" / gguf_inputs.PARTS[number]
        _write_sparse(path, data, len(data) + gguf_inputs.payload_size(tree))

    # Manifests.

    def _manifest(self, given: Input) -> None:
        if given.number % 16 == 0:
            self._resharded(given)
        manifest = decode(given.data, what="x")
        with accepted():
            check_manifest(manifest)
            raw = encode(manifest)
            assert decode(raw, what="x") == manifest, "decoding the canonical bytes gives another manifest"
            document = json.loads(raw)
            canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"
            assert raw == canonical == documents.seal(raw), "not canonical"
            digest = document.pop("manifest_sha256")
            assert without_defaults(json.loads(given.data)) == document, "something that was accepted is not kept"
            assert not [d for d in diff(manifest, manifest) if d.kind != "undecided"]
            if given.number % 32 == 0:
                save(manifest, self._scratch / "saved")
                assert (self._scratch / "saved" / "manifest.json").read_bytes() == raw, "other bytes are saved"
            if given.number % 8 == 0:
                self._validator.validate(document | {"manifest_sha256": digest})

    def _resharded(self, given: Input) -> None:
        """The same manifest in a folder, read by the commands that read folders."""
        folder = self._scratch / "resharded"
        (folder / "manifest.json").write_bytes(given.data)
        with self._only_reading(folder):
            checkpoint = inventory.open(folder)
            with accepted():
                check_files(checkpoint)
                checkpoint.missing_scales()
                checkpoint.unreadable()
                for layer in checkpoint.layers:
                    checkpoint.experts(layer)
                # The files are not there, and some would be compressed.
                with contextlib.suppress(SourceNotFoundError, UnsupportedModelError):
                    for file in checkpoint.manifest.files:
                        for tensor in file.tensors:
                            checkpoint.find(tensor.name)
                for options in ([], ["--json"]):
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        program.main(["show", str(folder), *options], standalone_mode=False)

    # Folders: index, headers and config together.

    def _make_folder(self, number: int) -> Path:
        folder = self._scratch / f"folder-{number}"
        folder.mkdir()
        files = documents.folder(number)
        for name, (data, payload) in files.items():
            _write_sparse(folder / name, data, len(data) + payload)
        if INDEX in files:
            # What an index may name and nobody may follow.
            (folder / "link.safetensors").symlink_to("../outside.safetensors")
            (folder / "linked").symlink_to("..")
            os.mkfifo(folder / "fifo.safetensors")
            (folder / "folder.safetensors").mkdir()
        return folder

    def _folder(self, given: Input) -> None:
        folder = self._folders[given.extra["folder"]]
        path = folder / given.extra["file"]
        try:
            _write_sparse(path, given.data, given.extra["size"])
            with self._only_reading(folder):
                source = read_source(folder)
                plan = make_plan(source, Selection())
                with accepted():
                    opened = inventory.open(folder)
            with accepted():
                check_plan(source, plan)
                check_manifest(opened.manifest)
                assert [file.path for file in opened.manifest.files] == list(source.shards)
                if layers := opened.layers:
                    experts = opened.experts(layers[0])[:1] or None
                    check_part(source, plan, Selection(layers=layers[:1], experts=experts))
        finally:
            data, payload = documents.folder(given.extra["folder"])[given.extra["file"]]
            _write_sparse(path, data, len(data) + payload)

    def _config(self, given: Input) -> None:
        path = self._scratch / "config" / "config.json"
        path.write_bytes(given.data)
        with self._only_reading(path.parent):
            config = read_config(LocalFolder(path.parent))
            facts = model_facts(config)
        for value in (facts.num_hidden_layers, facts.n_routed_experts, facts.num_experts_per_tok):
            assert value is None or (type(value) is int and 0 <= value <= 2**62)
        ModelConfig.from_dict(config)

    def _journal(self, given: Input) -> None:
        path = self._scratch / "journal" / "reshard-journal.jsonl"
        path.write_bytes(given.data)
        with self._only_reading(path.parent):
            begin = read_begin(path.parent)
            contents = read_journal(path.parent)
        # Whatever is believed is a chain from the first line on: nothing before it can be changed, lost or repeated.
        records = [] if contents is None else [contents.begin, *contents.records]
        assert begin == (records[0] if records else {})
        texts = [json.dumps(record, sort_keys=True, separators=(",", ":")).encode() for record in records]
        assert all(isinstance(record, dict) for record in records)
        checks = re.findall(rb'"check": *"([0-9a-f]{64})"', documents.chain(texts))
        position = 0
        for check in checks:
            position = given.data.index(check, position)

    # What is no JSON.

    def _archive(self, given: Input) -> None:
        size = given.extra["size"]
        content = unpack(given.data, size=size, what="x")
        assert len(content) == size, "another size than was asked for"
        if size and size < SMALL:
            streamed = zstandard.ZstdDecompressor().decompressobj().decompress(given.data)
            assert streamed == content, "a streaming reader sees other bytes"
            parse_header(content, file_bytes=size, what="x")

    def _name(self, given: Input) -> None:
        text = given.data.decode("utf-8", "surrogatepass")
        name = parse_name(text)
        assert name.text == text
        if name.layer is not None:
            assert text.startswith(f"model.layers.{name.layer}.")
        assert (name.expert is not None) == (name.role is Role.ROUTED_EXPERT)
        if name.expert is not None and name.layer is not None:
            assert text == f"{expert_prefix(name.layer, name.expert)}{name.projection}.{name.part}"
        place = place_of(name)
        path = format_path(place, Widths.for_numbers(name.layer or 0, name.expert or 0))
        assert parse_path(path) == place
        assert relative_fault(path) is None

    def _path(self, given: Input) -> None:
        text = given.data.decode("utf-8", "surrogatepass")
        place = parse_path(text)
        if place is not None:
            assert relative_fault(text) is None
            numbers = [len(part.partition(".")[0]) for part in text.split("/") if part[0].isdigit()]
            widths = Widths(layer=numbers[0] if numbers else 1, expert=numbers[1] if len(numbers) > 1 else 1)
            assert format_path(place, widths) == text, f"{place} is written otherwise"
        check_safe(check_relative(text, what="x"))


def _write_sparse(path: Path, data: bytes, size: int) -> None:
    """Write a file that is at least as long as its data, the rest of it a hole."""
    with path.open("wb") as file:
        file.write(data)
        if size > len(data):
            # Where the file system takes no such size, the file is shorter than it should be: an input as good.
            with contextlib.suppress(OSError):
                file.truncate(min(size, 2**62))
