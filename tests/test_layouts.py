"""The benchmarks' layouts against the published figures, and their sparse files: a misplaced byte must be seen.

The digests pin what was once compared, shard by shard and the index byte by byte, with a reconstruction of the
published files that agrees with every size and header length that is known.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import TensorSpec, serialize_file

from manifests.dtypes import nbytes
from manifests.header import parse_header
from manifests.inventory import read_shards
from manifests.names import find_missing_scales

STOCK_DTYPES = {"F8_E4M3": "float8_e4m3fn", "F32": "float32", "BF16": "bfloat16"}


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    """The modules ``layouts`` and ``sparse``: beside scripts, so they are found by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "benchmarks")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("layouts", "sparse")})


@pytest.fixture(scope="module")
def v3(benchmarks: SimpleNamespace) -> Any:
    return benchmarks.layouts.deepseek_v3()


@pytest.fixture(scope="module")
def kimi(benchmarks: SimpleNamespace) -> Any:
    return benchmarks.layouts.kimi_k2()


@pytest.fixture(scope="module")
def part(benchmarks: SimpleNamespace) -> Any:
    """Some 300 MB in two shards: attention, router, shared expert and two experts of a layer."""
    return benchmarks.layouts.deepseek_v3_part(300_000_000)


@pytest.fixture
def sparse_part(tmp_path: Path, benchmarks: SimpleNamespace, part: Any) -> Path:
    folder = tmp_path / "part"
    folder.mkdir()
    benchmarks.sparse.write_sparse(folder, part, random_bytes=4_000_000)
    return folder


def sha256_of_headers(layout: Any) -> str:
    return hashlib.sha256(b"".join(shard.header for shard in layout.shards)).hexdigest()


def json_bytes(shard: Any) -> int:
    return len(shard.header) - 8


def names_of(layout: Any) -> list[str]:
    return [tensor.name for shard in layout.shards for tensor in shard.tensors]


def test_deepseek_v3_has_the_published_figures(v3: Any) -> None:
    assert len(v3.shards) == 163
    assert v3.tensor_count == len(set(names_of(v3))) == 91_991
    assert v3.size == 688_586_727_753
    assert sum(shard.tensors[-1].end for shard in v3.shards) == 688_574_839_360
    assert json_bytes(v3.shards[0]) == 34_119
    assert json_bytes(v3.shards[159]) == 58_442
    assert (
        v3.shards[159]
        .header[8:]
        .startswith(
            b'{"__metadata__":{"format":"pt"},"model.layers.60.mlp.experts.184.up_proj.weight_scale_inv":'
            b'{"dtype":"F32","shape":[16,56],"data_offsets":[0,3584]},'
        )
    )
    sizes = {number: v3.shards[number - 1].size for number in (1, 2, 6, 7, 12, 34, 122, 141, 160, 163)}
    assert sizes == {
        1: 5_234_139_343,
        2: 4_302_383_966,
        6: 4_372_073_602,
        7: 4_306_080_097,
        12: 1_321_583_941,
        34: 1_747_417_474,
        122: 1_747_417_474,
        141: 3_142_388_798,
        160: 5_230_637_362,
        163: 6_584_784_447,
    }
    assert sha256_of_headers(v3) == "49de9938192c8eb61556e05179cb748afa0e5bb466399dde037db98b1ae4e887"


def test_deepseek_v3s_index_is_the_published_one(v3: Any) -> None:
    assert len(v3.index) == 8_898_324
    assert json.loads(v3.index)["metadata"] == {"total_size": 1_369_062_772_000}
    assert hashlib.sha256(v3.index).hexdigest() == "0e667a96c53f4c20066b43688edac74859bf916e2a3dfbc817a4ef9eed652181"


def test_deepseek_v3s_shards_cut_pairs_and_experts(v3: Any) -> None:
    assert (
        sum(f"{left.tensors[-1].name}_scale_inv" == right.tensors[0].name for left, right in pairwise(v3.shards)) == 155
    )
    shards_of = defaultdict(set)
    for shard in v3.shards:
        for tensor in shard.tensors:
            if ".experts." in tensor.name:
                shards_of[tensor.name.rsplit(".", 2)[0]].add(shard.name)
    assert len(shards_of) == 15_104
    assert sum(len(shards) == 2 for shards in shards_of.values()) == 153
    assert max(len(shards) for shards in shards_of.values()) == 2


def test_kimi_k2_has_the_published_figures(kimi: Any) -> None:
    assert [shard.name for shard in kimi.shards] == [f"model-{number}-of-61.safetensors" for number in range(1, 62)]
    assert kimi.tensor_count == len(set(names_of(kimi))) == 139_644
    elements = {tensor.name: prod(tensor.shape) for shard in kimi.shards for tensor in shard.tensors}
    assert sum(elements.values()) == 1_026_470_731_056
    # As the model's card counts: without scales and without the frequencies that nobody uses.
    parameters = sum(size for name, size in elements.items() if not name.endswith(("_scale_inv", "inv_freq")))
    assert parameters == 1_026_408_232_448
    assert kimi.size == 1_029_190_983_224
    assert sha256_of_headers(kimi) == "45dba93c04e56eadeaa9c8fa3c50b6f960f2f679bd9c248799b7d0a369f1ee84"


def test_kimi_k2s_headers_are_the_librarys(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    """Names and dtypes of a real shard, with tiny shapes; lengths of header that need padding and one that does not."""
    layouts = benchmarks.layouts
    for count in range(1, 9):
        names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(9, 9 + count)]
        tensors = [layouts.Tensor(name, "F8_E4M3", (3, 1)) for name in names]
        tensors += [layouts.Tensor(f"{name}_scale_inv", "F32", (1,)) for name in names]
        tensors += [layouts.Tensor("model.layers.1.input_layernorm.weight", "BF16", (5,) * count)]
        written = tmp_path / f"{count}.safetensors"
        buffers = {tensor.name: ctypes.create_string_buffer(nbytes(*tensor[1:])) for tensor in tensors}
        specs = {
            tensor.name: TensorSpec(
                dtype=STOCK_DTYPES[tensor.dtype],
                shape=list(tensor.shape),
                data_ptr=ctypes.addressof(buffers[tensor.name]),
                data_len=nbytes(*tensor[1:]),
            )
            for tensor in tensors
        }
        serialize_file(specs, written, {"format": "pt"})
        made = layouts.lay_out("x", layouts.library_order(tensors), align=8)
        assert written.read_bytes()[: len(made.header)] == made.header
        assert written.stat().st_size == made.size


def test_every_header_is_valid(v3: Any, kimi: Any) -> None:
    for shard in (*v3.shards[::23], *kimi.shards[::30]):
        assert parse_header(shard.header, file_bytes=shard.size, what=shard.name).tensors == shard.tensors


@pytest.mark.parametrize("count", [1, 3, 12, 163])
def test_first_shards_are_a_checkpoint(benchmarks: SimpleNamespace, v3: Any, count: int) -> None:
    first = benchmarks.layouts.deepseek_v3_first(count)
    assert len(first.shards) == count
    assert first.shards[0].name == f"model-00001-of-{count:06d}.safetensors"
    names = names_of(first)
    assert names == names_of(v3)[: len(names)]
    entries = [(tensor.name, tensor.dtype) for shard in first.shards for tensor in shard.tensors]
    assert find_missing_scales(entries) == []
    assert json.loads(first.index)["weight_map"].keys() == set(names)


@pytest.mark.parametrize("size", [10_000_000, 300_000_000, 8_600_000_000, 20_000_000_000])
def test_a_part_has_the_size_asked_for_in_shards_of_one_size(benchmarks: SimpleNamespace, size: int) -> None:
    made = benchmarks.layouts.deepseek_v3_part(size)
    assert size <= made.size < size + 130_000_000
    assert len(made.shards) == {8_600_000_000: 2, 20_000_000_000: 5}.get(size, 2)
    if size > 1_000_000_000:
        assert min(shard.size for shard in made.shards) > 0.9 * max(shard.size for shard in made.shards)
    names = names_of(made)
    assert names[0] == "model.layers.3.self_attn.q_a_proj.weight"
    entries = [(tensor.name, tensor.dtype) for shard in made.shards for tensor in shard.tensors]
    assert find_missing_scales(entries) == []


def test_sparse_files_are_a_checkpoint_that_takes_no_more_than_was_asked_for(
    benchmarks: SimpleNamespace, part: Any, sparse_part: Path
) -> None:
    found = read_shards(sparse_part)
    assert {name: header.raw for name, header in found.items()} == {shard.name: shard.header for shard in part.shards}
    allocated = benchmarks.sparse.allocated_bytes(sparse_part)
    # Beside the patches: headers, the documents, and what the file system keeps of extents.
    assert 2_000_000 < allocated < 4_000_000 + 200_000


def test_every_border_of_tensors_is_random_on_both_sides(part: Any, sparse_part: Path) -> None:
    for shard in part.shards:
        with (sparse_part / shard.name).open("rb") as file:
            for tensor in shard.tensors:
                for begin in (tensor.begin, tensor.end - 200):
                    file.seek(len(shard.header) + begin)
                    assert len(set(file.read(200))) > 80, f"{tensor.name} at {begin}"


def test_patches_are_apart_in_order_and_inside(benchmarks: SimpleNamespace, v3: Any) -> None:
    for budget in (0, 1 << 20, 6 << 20):
        ranges = benchmarks.sparse.choose_patches(v3.shards[159], budget)
        assert all(begin < end for begin, end in ranges)
        assert all(left[1] < right[0] for left, right in pairwise(ranges))
        assert ranges[0][0] <= len(v3.shards[159].header)
        assert ranges[-1][1] == v3.shards[159].size
        assert sum(end - begin for begin, end in ranges) <= max(budget, 256 << 10)


def test_the_same_again_is_the_same(benchmarks: SimpleNamespace, part: Any, sparse_part: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    benchmarks.sparse.write_sparse(again, part, random_bytes=4_000_000)
    for path in sparse_part.iterdir():
        assert benchmarks.sparse.first_difference(path, again / path.name) is None
    one, other = (sparse_part / shard.name for shard in part.shards)
    assert benchmarks.sparse.first_difference(one, other) == 0


def copy_with_holes(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        write.truncate(source.stat().st_size)
        position = 0
        while data := read.read(1 << 20):
            if any(data):
                os.pwrite(write.fileno(), data, position)
            position += len(data)


def test_any_changed_byte_is_found(benchmarks: SimpleNamespace, part: Any, sparse_part: Path) -> None:
    difference = benchmarks.sparse.first_difference
    shard = part.shards[1]
    path, other = sparse_part / shard.name, sparse_part / "other"
    copy_with_holes(path, other)
    assert difference(path, other) is None
    with path.open("rb") as file:
        hole = os.lseek(file.fileno(), len(shard.header) + (1 << 20), os.SEEK_HOLE)
    for at in (0, len(shard.header), hole - 1, hole, hole + 5000, shard.size - 1):
        with other.open("r+b") as file:
            file.seek(at)
            before = file.read(1)
            file.seek(at)
            file.write(bytes([before[0] ^ 1]))
        assert difference(path, other) == difference(other, path) == at
        with other.open("r+b") as file:
            file.seek(at)
            file.write(before)
    os.truncate(other, shard.size - 1)
    assert difference(path, other) == difference(other, path) == shard.size - 1


def test_holes_are_not_read(
    benchmarks: SimpleNamespace, part: Any, sparse_part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or comparing 689 GB would take an hour."""
    taken: list[int] = []

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        taken.append(size)
        return real(descriptor, size, offset)

    real = os.pread
    monkeypatch.setattr(os, "pread", pread)
    for shard in part.shards:
        path = sparse_part / shard.name
        assert benchmarks.sparse.first_difference(path, path) is None
    assert sum(taken) <= 2 * benchmarks.sparse.allocated_bytes(sparse_part)


def test_a_range_that_is_read_one_byte_off_is_found(benchmarks: SimpleNamespace, part: Any, sparse_part: Path) -> None:
    shard = part.shards[1]
    with (sparse_part / shard.name).open("rb") as file:
        descriptor = file.fileno()
        for tensor in shard.tensors:
            at, size = len(shard.header) + tensor.begin, tensor.end - tensor.begin
            assert benchmarks.sparse.first_difference_in(descriptor, at, descriptor, at, size) is None
            assert benchmarks.sparse.first_difference_in(descriptor, at, descriptor, at - 1, size) is not None
            assert benchmarks.sparse.first_difference_in(descriptor, at, descriptor, at + 1, size - 1) is not None


def test_allocated_bytes_count_a_file_once(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    (tmp_path / "below").mkdir()
    taken = benchmarks.sparse.allocated_bytes(tmp_path)
    assert taken >= 100_000
    os.link(tmp_path / "a", tmp_path / "below" / "b")
    assert benchmarks.sparse.allocated_bytes(tmp_path) == taken
    shutil.copy(tmp_path / "a", tmp_path / "below" / "c")
    assert benchmarks.sparse.allocated_bytes(tmp_path) == 2 * taken
