"""The element types of GGUF files: number, name, and the elements and bytes of one block.

A row of a tensor is stored as whole blocks, one after the other. Plain types have blocks of one element.
This file knows sizes only; what the bits of a block mean is not its matter.
Source: the type numbers of ggml's ``ggml_type`` and the sizes of its block structures (ggml-common.h). Numbers that
are missing belonged to types that ggml has dropped.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """One type.

    Attributes:
        name: Its name in ggml, such as ``Q4_K``.
        elements: Numbers in a block.
        size: Bytes of a block.
        dtype: The safetensors tag when a block is one plain number; None for quantised types.
    """

    name: str
    elements: int
    size: int
    dtype: str | None = None


def _plain(dtype: str, size: int) -> BlockType:
    # ggml and safetensors agree on these names.
    return BlockType(name=dtype, elements=1, size=size, dtype=dtype)


def _blocks(name: str, elements: int, size: int) -> BlockType:
    return BlockType(name=name, elements=elements, size=size)


BLOCK_TYPES: dict[int, BlockType] = {
    0: _plain("F32", 4),
    1: _plain("F16", 2),
    2: _blocks("Q4_0", 32, 18),
    3: _blocks("Q4_1", 32, 20),
    6: _blocks("Q5_0", 32, 22),
    7: _blocks("Q5_1", 32, 24),
    8: _blocks("Q8_0", 32, 34),
    9: _blocks("Q8_1", 32, 40),
    10: _blocks("Q2_K", 256, 84),
    11: _blocks("Q3_K", 256, 110),
    12: _blocks("Q4_K", 256, 144),
    13: _blocks("Q5_K", 256, 176),
    14: _blocks("Q6_K", 256, 210),
    15: _blocks("Q8_K", 256, 292),
    16: _blocks("IQ2_XXS", 256, 66),
    17: _blocks("IQ2_XS", 256, 74),
    18: _blocks("IQ3_XXS", 256, 98),
    19: _blocks("IQ1_S", 256, 50),
    20: _blocks("IQ4_NL", 32, 18),
    21: _blocks("IQ3_S", 256, 110),
    22: _blocks("IQ2_S", 256, 82),
    23: _blocks("IQ4_XS", 256, 136),
    24: _plain("I8", 1),
    25: _plain("I16", 2),
    26: _plain("I32", 4),
    27: _plain("I64", 8),
    28: _plain("F64", 8),
    29: _blocks("IQ1_M", 256, 56),
    30: _plain("BF16", 2),
    34: _blocks("TQ1_0", 256, 54),
    35: _blocks("TQ2_0", 256, 66),
    39: _blocks("MXFP4", 32, 17),
    40: _blocks("NVFP4", 64, 36),
    41: _blocks("Q1_0", 128, 18),
}
"""Every type by its number."""
