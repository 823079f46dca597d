"""How experts come in by default: mapped, where that takes no more room than it is worth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from runner import kernels, sizes

MIB = 1 << 20


def contents(expert: int, parts: int, *, is_in_place: bool = True, cache: Any = None) -> Any:
    return SimpleNamespace(
        is_in_place=is_in_place, expert_bytes=lambda _layers: expert, expert_parts=lambda _layers: parts, cache=cache
    )


CONFIG: Any = SimpleNamespace(first_k_dense_replace=1, num_hidden_layers=3)


@pytest.mark.parametrize(
    ("expert", "parts", "is_in_place", "expected"),
    [
        (44 * MIB, 1, True, "mmap"),  # DeepSeek-V3's shards
        (17 * MIB, 2, True, "mmap"),  # V2-Lite's, cut in two
        (6 * MIB, 3, True, "direct"),  # a GGUF file of V2-Lite
        (24 * MIB, 3, True, "mmap"),  # and of V3
        (6 * MIB, 1, False, "mmap"),  # resharded
    ],
)
def test_small_experts_in_several_parts_are_read(expert: int, parts: int, is_in_place: bool, expected: str) -> None:
    if kernels.library() is None:
        pytest.skip("products are not compiled here")
    assert sizes.default_io(contents(expert, parts, is_in_place=is_in_place), CONFIG) == expected


def test_from_a_server_nothing_is_mapped() -> None:
    assert sizes.default_io(contents(44 * MIB, 1, is_in_place=False, cache=object()), CONFIG) == "direct"


def test_without_the_library_nothing_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert sizes.default_io(contents(44 * MIB, 1), CONFIG) == "direct"
