"""Files mapped without a descriptor: the right bytes, read-only, and gone when nobody looks any more."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import pytest

from manifests.errors import IntegrityError, ResourceError, SourceNotFoundError, ToolkitError
from manifests.mapping import map_file


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_the_bytes_are_there_and_cannot_be_written(file: Path) -> None:
    view = map_file(file, 10_240)
    assert view == file.read_bytes()
    assert (view.format, view.itemsize, view.ndim, view.readonly, view.contiguous) == ("B", 1, 1, True, True)
    with pytest.raises(TypeError):
        view[0] = 1


def test_a_mapping_lives_as_long_as_anything_cut_from_it(file: Path) -> None:
    view = map_file(file, 10_240)
    part = view[300:310]
    del view
    gc.collect()
    assert mapped(file)
    assert bytes(part) == bytes(range(44, 54))
    del part
    gc.collect()
    assert not mapped(file)


def test_no_descriptor_is_kept(file: Path) -> None:
    before = os.listdir("/proc/self/fd")
    views = [map_file(file, 10_240) for _ in range(50)]
    assert os.listdir("/proc/self/fd") == before
    os.unlink(file)
    assert all(view[1] == 1 for view in views)


@pytest.mark.parametrize("size", [1, 10_239, 10_241, 1 << 40])
def test_another_size_is_refused_before_a_page_is_touched(file: Path, size: int) -> None:
    with pytest.raises(IntegrityError, match=f"has 10240 bytes, expected {size}"):
        map_file(file, size)
    assert not mapped(file)


def test_what_cannot_be_mapped(file: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "absent", file / "below"):
        with pytest.raises(SourceNotFoundError, match="no such file"):
            map_file(path, 1)
    with pytest.raises(ToolkitError):
        map_file(tmp_path, tmp_path.stat().st_size)


def test_no_room_for_another_open_file(file: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(ResourceError, match="Too many open files"):
            map_file(file, 10_240)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_than_the_address_space(file: Path) -> None:
    os.truncate(file, 1 << 43)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 42, limits[1]))
    try:
        with pytest.raises(ResourceError, match="cannot be mapped"):
            map_file(file, 1 << 43)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
