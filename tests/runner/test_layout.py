"""Layouts: every tensor's bytes are where its place says, whatever files and gaps they come from."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from manifests.checkpoint import Location
from runner.layout import HUGE_PAGE_BYTES, PAGE_BYTES, lay_out


def location(name: str, file: str, offset: int, size: int) -> Location:
    return Location(
        name=name,
        file=file,
        place=f"/somewhere/{file}",
        offset=offset,
        size=size,
        dtype="F8_E4M3",
        shape=(size,),
        logical_shape=(size,),
        codec="none",
        unpacked_size=10**9,
    )


@st.composite
def tensors(draw: st.DrawFn) -> list[Location]:
    """Tensors of up to three files, with gaps between them and none overlapping."""
    found = []
    for file in ("a", "b", "c")[: draw(st.integers(1, 3))]:
        at = draw(st.integers(0, 3 * PAGE_BYTES))
        for number in range(draw(st.integers(0, 5))):
            size = draw(st.integers(0, 3 * PAGE_BYTES) | st.integers(0, 3 * HUGE_PAGE_BYTES))
            found.append(location(f"{file}{number}", file, at, size))
            at += size + draw(st.just(0) | st.integers(0, 3 * PAGE_BYTES) | st.integers(0, 2 * HUGE_PAGE_BYTES))
    return draw(st.permutations(found))


@given(tensors(), st.sampled_from([PAGE_BYTES, HUGE_PAGE_BYTES]))
def test_reading_the_runs_puts_every_byte_in_its_place(locations: list[Location], alignment: int) -> None:
    layout = lay_out(locations, alignment=alignment)
    wanted = {one.name: one for one in locations if one.size}
    assert layout.places.keys() == wanted.keys()
    for name, place in layout.places.items():
        one = wanted[name]
        (run,) = (
            run for run in layout.runs if run.file == one.file and run.begin <= one.offset < run.end
        )  # exactly one run holds it
        assert one.offset + one.size <= run.end
        assert place.position == run.position + one.offset - run.offset
        assert (place.dtype, place.shape) == (one.dtype, one.shape)
    for run in layout.runs:
        assert run.offset % alignment == run.position % alignment == 0
        assert run.offset <= run.begin < run.offset + alignment
        assert run.position + run.end - run.offset <= layout.size
    # No two runs share a byte of memory, nor a page of a file.
    ends = sorted(
        (run.position, run.position + -(-(run.end - run.offset) // PAGE_BYTES) * PAGE_BYTES) for run in layout.runs
    )
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
    assert layout.needed_bytes >= sum(one.size for one in wanted.values())
    assert layout.size % PAGE_BYTES == 0


def test_an_expert_of_one_file_is_one_run() -> None:
    sizes = (14_680_064, 14_680_064, 14_680_064, 3584, 3584, 3584)
    at, found = 4096, []
    for number, size in enumerate(sizes):
        found.append(location(str(number), "layers/03/experts/000.safetensors", at, size))
        at += size
    layout = lay_out(found)
    (run,) = layout.runs
    assert (run.offset, run.begin, run.end) == (4096, 4096, at)
    assert layout.needed_bytes == sum(sizes)
    # Mapped from the first byte of the file, so that huge pages of memory and file agree.
    (run,) = lay_out(found, alignment=HUGE_PAGE_BYTES).runs
    assert (run.offset, run.begin, run.position) == (0, 4096, 0)


def test_nothing_takes_nothing() -> None:
    layout = lay_out([location("empty", "a", 100, 0)])
    assert (layout.size, layout.runs, layout.places) == (0, (), {})
