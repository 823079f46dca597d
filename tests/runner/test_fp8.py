"""FP8 blocks against the bit definition, ragged edges, and products slab by slab."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import runner.fp8
from manifests.errors import IntegrityError, UnsupportedModelError
from runner.fp8 import Matrix, dequantize, linear


def random_fp8(rows: int, columns: int, block: int = 128) -> Matrix:
    """Any codes but NaN; scales that differ by orders of magnitude, so that a neighbour's would show."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    code = torch.randint(0, 127, (rows, columns), generator=generator)
    code += 128 * torch.randint(0, 2, (rows, columns), generator=generator)
    grid = (-(-rows // block), -(-columns // block))
    scale = 10 ** (4 * torch.rand(grid, generator=generator) - 4)
    return Matrix(weight=code.to(torch.uint8).view(torch.float8_e4m3fn), scale=scale, block=(block, block))


def test_all_256_codes(reference: SimpleNamespace) -> None:
    code = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scale = torch.tensor([[3.0, 5.0]])
    ours = dequantize(Matrix(weight=code.view(torch.float8_e4m3fn), scale=scale))
    factor = torch.tensor([3.0] * 128 + [5.0] * 128)
    torch.testing.assert_close(ours[0], reference.fp8.TABLE * factor, rtol=0, atol=0, equal_nan=True)
    assert ours.isnan().nonzero()[:, 1].tolist() == [0x7F, 0xFF]
    assert ours[0, 0x7E] == 448 * 3
    assert torch.signbit(ours[0, 0x80])


@pytest.mark.parametrize(
    ("rows", "columns"),
    # 576 x 5 blocks is V3's kv_a_proj, where rows / blocks is no integer; 192 and 320 rows would pass for whole
    # blocks of 96 and 106.67; then edges and single elements.
    [(576, 200), (192, 320), (320, 192), (128, 128), (129, 127), (1, 1), (1, 300), (300, 1), (256, 384)],
)
def test_ragged_blocks_equal_the_reference(reference: SimpleNamespace, rows: int, columns: int) -> None:
    matrix = random_fp8(rows, columns)
    expected = reference.fp8.dequantize(matrix.weight, matrix.scale)
    torch.testing.assert_close(dequantize(matrix), expected, rtol=0, atol=0)


def test_block_size_is_taken_from_the_matrix_not_from_shapes(reference: SimpleNamespace) -> None:
    fine = random_fp8(100, 70, block=32)
    expected = reference.fp8.dequantize(fine.weight, fine.scale, 32)
    torch.testing.assert_close(dequantize(fine), expected, rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (3, 2), (2, 3), (4,)])
def test_a_grid_that_does_not_fit_is_refused_by_name(grid: tuple[int, ...]) -> None:
    weight = torch.zeros(192, 200).to(torch.float8_e4m3fn)
    matrix = Matrix(weight=weight, scale=torch.ones(grid), name="model.layers.3.x.weight")
    for use in (dequantize, lambda m: linear(torch.ones(1, 200), m)):
        with pytest.raises(IntegrityError, match=r"model\.layers\.3\.x\.weight.*scale grid"):
            use(matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_weights_are_widened(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7).to(dtype)
    expanded = dequantize(Matrix(weight=weight, scale=None))
    assert expanded.dtype == torch.float32
    assert torch.equal(expanded, weight.float())


def test_float32_is_not_copied() -> None:
    weight = torch.randn(5, 7)
    assert dequantize(Matrix(weight=weight, scale=None)).data_ptr() == weight.data_ptr()


def test_dtypes_that_are_not_read() -> None:
    eight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    for weight, scale in (
        (eight, None),  # the scales are missing
        (eight.to(torch.float8_e5m2), None),
        (torch.ones(4, 4, dtype=torch.int8), None),
        (torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(1, 1)),
    ):
        with pytest.raises(UnsupportedModelError, match="here is"):
            dequantize(Matrix(weight=weight, scale=scale, name="here is"))


@pytest.mark.usefixtures("every_way")
def test_nan_stays_nan() -> None:
    matrix = random_fp8(130, 130)
    matrix.weight.view(torch.uint8)[129, 129] = 0x7F
    assert dequantize(matrix).isnan().nonzero().tolist() == [[129, 129]]
    assert linear(torch.ones(2, 130), matrix).isnan().nonzero().tolist() == [[0, 129], [1, 129]]


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("limit", [1, 200 * 128, 200 * 256, 1 << 22])
def test_linear_equals_the_expanded_product(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(runner.fp8, "_EXPANDED_ELEMENTS", limit)
    matrix = random_fp8(450, 200)
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ dequantize(matrix).double().T
    torch.testing.assert_close(linear(x, matrix).double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.usefixtures("torch_alone")
def test_linear_expands_a_bounded_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    expand = runner.fp8._expand

    def watched(matrix: Matrix, begin: int, end: int) -> torch.Tensor:
        made = expand(matrix, begin, end)
        sizes.append(tuple(made.shape))
        return made

    monkeypatch.setattr(runner.fp8, "_expand", watched)
    monkeypatch.setattr(runner.fp8, "_EXPANDED_ELEMENTS", 300 * 200)
    linear(torch.ones(1, 200), random_fp8(450, 200))
    assert sizes == [(256, 200), (194, 200)]


@pytest.mark.usefixtures("every_way")
def test_bfloat16_rounds_the_activation_and_nothing_else() -> None:
    matrix = random_fp8(150, 140)
    x = torch.randn(2, 140, generator=torch.Generator().manual_seed(0))  # more may be added up in another order
    rounded = linear(x, matrix, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, linear(x.bfloat16().float(), matrix))
    torch.testing.assert_close(rounded, x.bfloat16().float() @ dequantize(matrix).T, rtol=1e-5, atol=1e-4)
    assert not torch.equal(rounded, linear(x, matrix))
