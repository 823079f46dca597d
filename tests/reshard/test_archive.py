"""Experts as zstd frames: the same bytes give the same frame, and no frame does harm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

import manifests
from manifests.errors import (
    IntegrityError,
    ResourceError,
)
from reshard import archive, blocks, openable
from reshard.packing import pack
from reshard.progress import Progress
from reshard.restore import check
from reshard.saved import read_saved_headers

EXPERT = "layers/1/experts/2.safetensors"


def test_blocks_of_any_cut_give_the_same_frame(tmp_path: Path) -> None:
    content = bytes(range(256)) * 3000 + bytes(500_000)

    def frame(*cuts: int) -> bytes:
        path = tmp_path / "x"
        path.unlink(missing_ok=True)
        writer = blocks.Writer(path)
        ends = [*cuts, len(content)]
        parts = (memoryview(content)[begin:end] for begin, end in zip([0, *cuts], ends, strict=True))
        archive.write_packed(parts, writer, size=len(content))
        writer.finish()
        return path.read_bytes()

    assert frame() == frame(1, 2, 500_000, 500_001, 1_000_000) == frame(131_072, 262_144)


def test_every_flipped_bit_of_a_frame_is_found(v2_packed: Path, v2_resharded: Path, tmp_path: Path) -> None:
    """Or makes no difference: some bits of a frame say nothing. Nothing else is raised."""
    raw, content = (v2_packed / f"{EXPERT}.zst").read_bytes(), (v2_resharded / EXPERT).read_bytes()
    path = tmp_path / "x.zst"
    unharmed, messages = 0, set()
    for position in (*range(40), *range(40, len(raw), 37), *range(len(raw) - 8, len(raw))):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << position % 8]) + raw[position + 1 :])
        try:
            found = b"".join(map(bytes, archive.unpack_blocks(path, size=len(content))))
        except IntegrityError as error:
            messages.add(str(error).split(":")[0])
        else:
            assert found == content
            unharmed += 1
    assert messages == {str(path)}
    assert unharmed < 5


@pytest.mark.parametrize("difference", [-1, 1, 5000])
def test_another_size_than_promised(v2_packed: Path, v2_resharded: Path, difference: int) -> None:
    size = (v2_resharded / EXPERT).stat().st_size + difference
    with pytest.raises(IntegrityError, match=r"zst: (its zstd frame ends|unpacks to more)"):
        list(archive.unpack_blocks(v2_packed / f"{EXPERT}.zst", size=size))


def test_a_cut_frame(v2_packed: Path, v2_resharded: Path, tmp_path: Path) -> None:
    raw = (v2_packed / f"{EXPERT}.zst").read_bytes()
    for length in (0, 3, 10, 100, len(raw) // 2, len(raw) - 5):
        (tmp_path / "x").write_bytes(raw[:length])
        with pytest.raises(IntegrityError, match="x: "):
            list(archive.unpack_blocks(tmp_path / "x", size=(v2_resharded / EXPERT).stat().st_size))


def test_a_wrong_checksum_that_is_read_by_itself(
    v2_packed: Path, v2_resharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = (v2_packed / f"{EXPERT}.zst").read_bytes()
    (tmp_path / "x").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", len(raw) - 4)
    with pytest.raises(IntegrityError, match=r"x: damaged zstd frame: .*checksum"):
        list(archive.unpack_blocks(tmp_path / "x", size=(v2_resharded / EXPERT).stat().st_size))


@pytest.mark.parametrize("tail", [b"x", bytes(30_000_000), zstandard.compress(b"more")])
def test_bytes_behind_the_frame(v2_packed: Path, v2_resharded: Path, tmp_path: Path, tail: bytes) -> None:
    """They are not covered by its checksum, and the file would not be the one that packing gives."""
    (tmp_path / "x").write_bytes((v2_packed / f"{EXPERT}.zst").read_bytes() + tail)
    with pytest.raises(IntegrityError, match="x: "):
        list(archive.unpack_blocks(tmp_path / "x", size=(v2_resharded / EXPERT).stat().st_size))


def test_a_frame_that_would_fill_memory(tmp_path: Path) -> None:
    """64 MB of zeros in some kilobytes, of which the manifest promises a few bytes: no more than these are made."""
    bomb = tmp_path / "bomb.zst"
    bomb.write_bytes(zstandard.ZstdCompressor().compress(bytes(64_000_000)))
    content = archive.unpack_blocks(bomb, size=1000)
    assert bytes(next(content)) == bytes(1000)
    with pytest.raises(IntegrityError, match=r"bomb\.zst: unpacks to more bytes"):
        next(content)
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=27)).compressobj()
    bomb.write_bytes(wide.compress(bytes(1000)) + wide.flush())
    with pytest.raises(IntegrityError, match=r"bomb\.zst: damaged zstd frame: .*memory"):
        list(archive.unpack_blocks(bomb, size=1000))
    with pytest.raises(ResourceError, match="reshard unpack"):
        archive.UnpackingReader(bomb, archive.MAX_EXPERT_BYTES + 1, lambda: iter(()))


def test_an_empty_file_unpacks_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(archive.pack(b""))
    assert list(archive.unpack_blocks(tmp_path / "x", size=0)) == []


def test_each_expert_is_unpacked_once_for_a_shard(resharded_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight lies at the begin of its file and its scale at the end, and a shard has one behind the other."""
    read: list[str] = []
    real = archive.unpack_blocks

    def counted(path: Path, *, size: int) -> Iterator[memoryview]:
        read.append(path.name)
        return real(path, size=size)

    monkeypatch.setattr(openable, "unpack_blocks", counted)
    with Progress(0, label="", quiet=True) as progress:
        pack(resharded_copy, jobs=2, progress=progress)
        read.clear()
        check(manifests.open(resharded_copy), jobs=1, progress=progress)
    checkpoint = manifests.open(resharded_copy)
    file_of = {place.name: place.file for place in checkpoint.tensors()}
    wanted = []
    for header in read_saved_headers(checkpoint).values():
        wanted += sorted({file_of[tensor.name] for tensor in header.tensors})
    assert sorted(read) == sorted(Path(file).name for file in wanted if file.endswith(".zst"))
