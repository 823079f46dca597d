"""The compiled products of native/kernels.c on torch's memory, where they could be built.

What they compute is said in `runner.fp8` and `runner.moe`, which compute it themselves where there are none. One thread
of Python calls them at a time; they use as many threads as torch. This file must not know names, files or layers.

Shapes: T tokens, D hidden, I inputs, O outputs.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from manifests.schema import PLAIN

if TYPE_CHECKING:
    from runner.fp8 import Matrix, Mlp

VARIANTS = ("portable", "avx2", "avx512", "avx512-vbmi")
"""Instruction sets, slowest first; the last that the processor has is taken."""

_KINDS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_ENCODED_KINDS = {
    encoding: 4 + number
    for number, encoding in enumerate(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"))
}

_room_lock = threading.Lock()
"""Models in several threads take turns: what they work in, and the library's threads, are there once."""

# A child has no other thread that would give it back, nor the library's if it is starting them.
os.register_at_fork(before=_room_lock.acquire, after_in_parent=_room_lock.release, after_in_child=_room_lock.release)

_started: dict[str, tuple[str, int, int]] = {}
"""Variant and threads that the library, of which there is one in a process, was started with."""


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("block_rows", ctypes.c_int32),
        ("block_columns", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _Expert(ctypes.Structure):
    _fields_ = (
        ("gate", _Matrix),
        ("up", _Matrix),
        ("down", _Matrix),
        ("token", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("y", ctypes.c_void_p),
    )


class _Part(ctypes.Structure):
    _fields_ = (
        ("y", ctypes.c_void_p),
        ("token", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("kv_b", _Matrix),
        ("q", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("k_pe", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("cached", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("nope", ctypes.c_int64),
        ("rotary", ctypes.c_int64),
        ("value", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("rounds", ctypes.c_int32),
    )


class _Routing(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("top", ctypes.c_int64),
        ("normalise", ctypes.c_int32),
        ("factor", ctypes.c_float),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one expert adds to a sum.

    Attributes:
        y: [t, D] float32.
        token: [t] int64, the rows of the sum; None for all.
        weight: [t] float32, the factor of each; None for 1.
    """

    y: Tensor
    token: Tensor | None = None
    weight: Tensor | None = None


def multiplies(matrix: "Matrix") -> bool:
    """Whether there are products with a matrix as it is stored; the rarer encodings have to be expanded."""
    return matrix.encoding == PLAIN or matrix.encoding in _ENCODED_KINDS


def expands(encoding: str) -> bool:
    """Whether blocks of this type can be expanded here, by `Kernels.expand`."""
    return active() is not None and encoding in _ENCODED_KINDS


class Kernels:
    """The library, with an instruction set chosen.

    Attributes:
        variant: Of VARIANTS.
    """

    def __init__(self, library: ctypes.CDLL, variant: str) -> None:
        self.variant = variant
        self._library = library
        # Kept: tens of megabytes, whose pages would be new to the system at each call.
        self._room = torch.empty(0)

    def linear(self, x_TI: Tensor, matrix: "Matrix", *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give [T, O] float32, the product of activations and a matrix.

        Args:
            x_TI: [T, I] float32, rounded to ``dtype``.
            matrix: [O, I], checked, and one that it `multiplies`.
            dtype: With bfloat16 the order of the sums may depend on T; never on the threads.
        """
        self._prepare()
        x_TI = x_TI.contiguous()
        tokens = x_TI.shape[0]
        out_TO = x_TI.new_empty(tokens, matrix.shape[0])
        kept: list[Tensor] = []
        described = ctypes.byref(_describe(matrix, kept))
        if dtype is torch.bfloat16 and (needed := self._library.rk_linear_room(described, tokens)):
            with _room_lock:
                self._library.rk_linear(described, x_TI.data_ptr(), tokens, out_TO.data_ptr(), self._room_of(needed))
        else:
            self._library.rk_linear(described, x_TI.data_ptr(), tokens, out_TO.data_ptr(), None)
        return out_TO

    def expand(self, matrix: "Matrix") -> Tensor:
        """Give [O, I] float32, what the blocks of a matrix stand for, exactly as ggml defines them.

        Args:
            matrix: [O, I], checked, with an encoding that it `multiplies`.
        """
        self._prepare()
        kept: list[Tensor] = []
        out_OI = torch.empty(matrix.shape)
        self._library.rk_expand(ctypes.byref(_describe(matrix, kept)), out_OI.data_ptr())
        return out_OI

    def experts(
        self, experts: "Sequence[tuple[Mlp, Tensor | None]]", x_TD: Tensor, *, dtype: torch.dtype
    ) -> list[Tensor]:
        """Give down(silu(gate x) * up x) of each expert, [t, D] float32.

        Args:
            experts: Matrices as for `linear`, and the rows of x that they are for, [t] int64; None for all.
            x_TD: [T, D] float32, rounded to ``dtype``.
            dtype: bfloat16 rounds what enters ``down`` as well.
        """
        if not experts:
            return []
        self._prepare()
        x_TD = x_TD.contiguous()
        kept: list[Tensor] = []
        counts = [x_TD.shape[0] if token is None else token.shape[0] for _, token in experts]
        found = list(x_TD.new_empty(sum(counts), x_TD.shape[1]).split(counts))
        described = (_Expert * len(experts))(
            *(_describe_expert(*expert, y, kept) for expert, y in zip(experts, found, strict=True))
        )
        rounds = dtype is torch.bfloat16
        with _room_lock:
            room = self._room_of(self._library.rk_experts_room(described, len(experts), rounds))
            if self._library.rk_experts(described, len(experts), x_TD.data_ptr(), room, rounds):
                raise MemoryError
        return found

    def add(self, parts: Sequence[Part], out_TD: Tensor) -> None:
        """Add the parts to a contiguous [T, D] float32, in their order."""
        self._prepare()
        described = (_Part * len(parts))(
            *(_Part(part.y.data_ptr(), _address(part.token), _address(part.weight), part.y.shape[0]) for part in parts)
        )
        self._library.rk_sum(described, len(parts), out_TD.shape[1], out_TD.data_ptr())

    def read(self, memory: Tensor) -> int:
        """Read a tensor's memory as the products do, and nothing else: the floor of what they can take.

        Returns:
            The sum of its 64-bit numbers, modulo 2**64; a last part of less than 64 bytes is left out.
        """
        self._prepare()
        memory = memory.contiguous()
        return int(self._library.rk_read(memory.data_ptr(), memory.numel() * memory.element_size()))

    def attend(
        self,
        q_THQ: Tensor,
        rotation: tuple[Tensor, Tensor],
        c_SC: Tensor,
        k_pe_SR: Tensor,
        kv_b: "Matrix",
        *,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Attend causally from the last T of S positions over latents, as `runner.attention` describes.

        A token's numbers are the same whatever tokens come with it, and whatever the threads.

        Args:
            q_THQ: [T, H, N+R] float32, not yet rotated.
            rotation: cos and sin of the T positions, [T, R/2] float32.
            c_SC: [S, C] float32, normalised latents.
            k_pe_SR: [S, R] float32, rotated.
            kv_b: [H * (N+V), C], as for `linear`; it is read as it is stored.
            scale: On the scores, before the softmax.
            dtype: bfloat16 rounds what enters the two products with ``kv_b``.

        Returns:
            [T, H, V] float32.
        """
        self._prepare()
        (tokens, heads, width), (cached, rotary) = q_THQ.shape, k_pe_SR.shape
        value = kv_b.shape[0] // heads - (width - rotary)
        out_THV = q_THQ.new_empty(tokens, heads, value)
        kept = [tensor.contiguous() for tensor in (q_THQ, *rotation, c_SC, k_pe_SR)]
        pointers = [tensor.data_ptr() for tensor in (*kept, out_THV)]
        described = ctypes.byref(
            _Attention(
                _describe(kv_b, kept), *pointers, tokens, cached, heads, width - rotary, rotary, value, scale,
                dtype is torch.bfloat16,
            )
        )  # fmt: skip
        with _room_lock:
            self._library.rk_attend(described, self._room_of(self._library.rk_attend_room(described)))
        return out_THV

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Divide the rows of [T, D] float32 by their root mean square and multiply by the weight, [D] float32."""
        self._prepare()
        if x_TD.stride(1) != 1:
            x_TD = x_TD.contiguous()
        weight_D = weight_D.contiguous()
        rows, size = x_TD.shape
        out_TD = x_TD.new_empty(rows, size)
        self._library.rk_norm(x_TD.data_ptr(), rows, x_TD.stride(0), weight_D.data_ptr(), size, eps, out_TD.data_ptr())
        return out_TD

    def latents(
        self,
        x_TX: Tensor,
        weight_C: Tensor,
        eps: float,
        rotation: tuple[Tensor, Tensor],
        c_SC: Tensor,
        k_pe_SR: Tensor,
    ) -> None:
        """Write what the cache keeps of the last T of S positions: normed latents, and rotated keys.

        Args:
            x_TX: [T, C+R] float32, latents and keys as they are projected.
            weight_C: [C] float32.
            eps: As for `norm`.
            rotation: cos and sin of the T positions, [T, R/2] float32.
            c_SC: [S, C] float32, contiguous; its last T rows are written.
            k_pe_SR: [S, R] float32, likewise.
        """
        self._prepare()
        kept = [tensor.contiguous() for tensor in (x_TX, weight_C, *rotation)]
        x, weight, cos, sin = (tensor.data_ptr() for tensor in kept)
        tokens, (cached, latent), rotary = x_TX.shape[0], c_SC.shape, k_pe_SR.shape[1]
        before = (cached - tokens) * c_SC.element_size()
        c, k_pe = c_SC.data_ptr() + before * latent, k_pe_SR.data_ptr() + before * rotary
        self._library.rk_latents(x, tokens, weight, latent, eps, cos, sin, rotary, c, k_pe)

    def route(
        self,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        *,
        groups: tuple[int, int],
        top: int,
        normalise: bool,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        """Choose experts, each token for itself.

        Args:
            logits_TE: [T, E] float32.
            bias_E: [E] float32, for sigmoid scores; None for softmax.
            groups: How many there are, and how many of them are kept.
            top: K, at most as many experts as the kept groups have.
            normalise: Whether the chosen scores are divided by their sum.
            factor: On the weights.

        Returns:
            Ids [T, K] int64, ascending in each row, and weights [T, K] float32.
        """
        self._prepare()
        logits_TE = logits_TE.contiguous()
        bias_E = None if bias_E is None else bias_E.contiguous()
        tokens, experts = logits_TE.shape
        ids_TK = torch.empty(tokens, top, dtype=torch.int64)
        weights_TK, room = logits_TE.new_empty(tokens, top), logits_TE.new_empty(tokens, 4, experts)
        described = _Routing(
            logits_TE.data_ptr(), None if bias_E is None else bias_E.data_ptr(), tokens, experts, *groups, top,
            normalise, factor, ids_TK.data_ptr(), weights_TK.data_ptr(), room.data_ptr(),
        )  # fmt: skip
        self._library.rk_route(ctypes.byref(described))
        return ids_TK, weights_TK

    def _room_of(self, floats: int) -> int:
        """Address of so many floats to work in; the caller holds the lock."""
        if self._room.numel() < floats:
            self._room = torch.empty(floats)
        return self._room.data_ptr()

    def _prepare(self) -> None:
        # A forked child has none of the threads.
        wanted = (self.variant, torch.get_num_threads(), os.getpid())
        if _started.get("with") != wanted:
            with _room_lock:
                self._library.rk_start(VARIANTS.index(self.variant), wanted[1])
                _started["with"] = wanted


def _describe(matrix: "Matrix", kept: list[Tensor]) -> _Matrix:
    """A matrix for C; what must live as long is added to ``kept``."""
    if matrix.described:
        return cast(_Matrix, matrix.described[0])
    weight, scale = matrix.weight.contiguous(), matrix.scale
    kept.append(weight)
    if scale is not None:
        scale = scale.to(torch.float32).contiguous()
        kept.append(scale)
    rows, columns = matrix.shape
    kind = _KINDS[weight.dtype] if matrix.encoding == PLAIN else _ENCODED_KINDS[matrix.encoding]
    found = _Matrix(
        weight.data_ptr(), None if scale is None else scale.data_ptr(), rows, columns, *matrix.block, kind, 0
    )
    if weight is matrix.weight and scale is matrix.scale:  # which live as long as the matrix
        matrix.described.append(found)
    return found


def _describe_expert(mlp: "Mlp", token: Tensor | None, y: Tensor, kept: list[Tensor]) -> _Expert:
    matrices = (_describe(matrix, kept) for matrix in (mlp.gate, mlp.up, mlp.down))
    return _Expert(*matrices, _address(token), y.shape[0], y.data_ptr())


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError("an operand is not contiguous")
    return tensor.data_ptr()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library as it was built; None where it was not, or is of another machine."""
    for path in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            found = ctypes.CDLL(str(path))
        except OSError:
            continue
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        found.rk_supports.argtypes = (ctypes.c_int,)
        found.rk_start.argtypes = (ctypes.c_int, ctypes.c_int)
        found.rk_linear_room.argtypes = (ctypes.POINTER(_Matrix), number)
        found.rk_linear_room.restype = number
        found.rk_linear.argtypes = (ctypes.POINTER(_Matrix), pointer, number, pointer, pointer)
        found.rk_linear.restype = None
        found.rk_expand.argtypes = (ctypes.POINTER(_Matrix), pointer)
        found.rk_expand.restype = None
        found.rk_read.argtypes = (pointer, number)
        found.rk_read.restype = ctypes.c_uint64
        found.rk_experts_room.argtypes = (ctypes.POINTER(_Expert), number, ctypes.c_int)
        found.rk_experts_room.restype = number
        found.rk_experts.argtypes = (ctypes.POINTER(_Expert), number, pointer, pointer, ctypes.c_int)
        found.rk_sum.argtypes = (ctypes.POINTER(_Part), number, number, pointer)
        found.rk_sum.restype = None
        found.rk_guard.argtypes = (pointer, number, number, pointer)
        found.rk_unguard.argtypes = (ctypes.c_int,)
        found.rk_unguard.restype = None
        found.rk_attend_room.argtypes = (ctypes.POINTER(_Attention),)
        found.rk_attend_room.restype = number
        found.rk_attend.argtypes = (ctypes.POINTER(_Attention), pointer)
        found.rk_attend.restype = None
        found.rk_latents.argtypes = (
            pointer, number, pointer, number, ctypes.c_float, pointer, pointer, number, pointer, pointer,
        )  # fmt: skip
        found.rk_latents.restype = None
        found.rk_route.argtypes = (ctypes.POINTER(_Routing),)
        found.rk_route.restype = None
        found.rk_norm.argtypes = (pointer, number, number, pointer, number, ctypes.c_float, pointer)
        found.rk_norm.restype = None
        return found
    return None


def supported() -> tuple[str, ...]:
    """The variants that this build and this processor have, slowest first; none without a library."""
    found = library()
    return () if found is None else tuple(v for number, v in enumerate(VARIANTS) if found.rk_supports(number))


@functools.cache
def active() -> Kernels | None:
    """What products use; None for torch alone."""
    found = library()
    return None if found is None else Kernels(found, supported()[-1])
