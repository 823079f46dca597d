"""The shard writer: the rule by hand on a small example, and files that the stock library opens."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from safetensors import safe_open

from runner.demo.shards import StoredTensor, element_limit, split, write


def _tensor(name: str, elements: int) -> StoredTensor:
    return StoredTensor(name=name, dtype="F8_E4M3", shape=(elements,), data=bytes(range(elements)))


def _names(shards: list[list[StoredTensor]]) -> list[str]:
    return ["".join(tensor.name for tensor in shard) for shard in shards]


# Weights in capitals, each followed by its scale. At a limit of 10: A+a+B reach 6+1+4 = 11, so b opens the next shard;
# b+C = 1+9 are exactly 10; the stage ends with c. The second stage starts anew although c's shard has room.
STAGES = [
    [_tensor("A", 6), _tensor("a", 1), _tensor("B", 4), _tensor("b", 1), _tensor("C", 9), _tensor("c", 1)],
    [_tensor("D", 3), _tensor("d", 1)],
]


def test_a_shard_closes_as_soon_as_its_elements_reach_the_limit() -> None:
    assert _names(split(STAGES, 10)) == ["AaB", "bC", "c", "Dd"]
    assert _names(split(STAGES, 11)) == ["AaB", "bCc", "Dd"]
    assert _names(split(STAGES, 12)) == ["AaBb", "Cc", "Dd"]


def test_a_stage_that_ends_on_the_limit_leaves_no_empty_shard() -> None:
    assert _names(split([[_tensor("A", 5)], [_tensor("B", 5)]], 5)) == ["A", "B"]


def test_element_limit_is_the_smallest_that_gives_the_number() -> None:
    assert element_limit(STAGES, 4) == 7  # Aa, BbC, c, Dd
    assert element_limit(STAGES, 3) == 11
    assert element_limit(STAGES, 2) == 22
    assert element_limit(STAGES, 8) == 1


def test_element_limit_refuses_a_number_that_no_limit_gives() -> None:
    equal = [[_tensor(name, 4) for name in "ABCD"]]
    assert [len(split(equal, limit)) for limit in (4, 5, 8, 9, 12, 13)] == [4, 2, 2, 2, 2, 1]
    with pytest.raises(ValueError, match="no element limit gives 3 shards"):
        element_limit(equal, 3)


def test_written_files_are_compact_unpadded_and_in_order(tmp_path: Path) -> None:
    write(tmp_path, split(STAGES, 10))
    raw = (tmp_path / "model-00001-of-000004.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = (
        '{"__metadata__":{"format":"pt"},'
        '"A":{"dtype":"F8_E4M3","shape":[6],"data_offsets":[0,6]},'
        '"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[6,7]},'
        '"B":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[7,11]}}'
    )
    assert raw[8 : 8 + length].decode() == header
    assert raw[8 + length :] == bytes([0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3])


def test_the_index_names_every_tensor_and_counts_two_bytes_an_element(tmp_path: Path) -> None:
    write(tmp_path, split(STAGES, 10))
    text = (tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8")
    index = json.loads(text)
    assert text.startswith('{\n  "metadata": {\n    "total_size": 52\n')  # 26 elements, scales included
    assert {name: file[6:11] for name, file in index["weight_map"].items()} == {
        "A": "00001", "a": "00001", "B": "00001", "b": "00002", "C": "00002", "c": "00003", "D": "00004", "d": "00004",
    }  # fmt: skip
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - the library's object is no mapping


def test_bytes_must_fill_the_shape() -> None:
    with pytest.raises(ValueError, match="3 bytes do not fill F32"):
        StoredTensor(name="x", dtype="F32", shape=(1,), data=b"abc")
