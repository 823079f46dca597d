"""llama.cpp, through its Python package: the logits and token ids that it makes of a GGUF file, and its quantiser.

Only the package's low-level calls are used, which are llama.cpp's C functions. Whoever imports this file needs the
extra ``llama``. It must not know anything of the runner: it is what the runner is checked against.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

FILE_TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
}
"""Mixtures of types that its quantiser makes, by the names that people call files with."""

_CTX = 256


@llama_cpp.llama_log_callback
def _discard(_level: int, _text: bytes, _data: object) -> None:
    """Keep its progress and warnings out of the tests' output."""


llama_cpp.llama_log_set(_discard, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def version() -> str:
    """Of the package, and of the llama.cpp in it."""
    return f"{llama_cpp.__version__}, llama.cpp {llama_cpp.llama_cpp.llama_version().decode()}"


def quantise(source: Path, target: Path, file_type: str) -> Path:
    """Write a model in another mixture of types; ``F32`` expands a quantised one.

    Args:
        source: A GGUF file.
        target: The file to write.
        file_type: A key of FILE_TYPES.

    Returns:
        `target`.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type]
    params.allow_requantize = True
    params.nthread = 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return target


def logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """The logits after every one of these ids, all read in one pass: [T, V] float32.

    As near to exact arithmetic as it goes: keys and values are kept in float32, and attention is not fused.
    What it multiplies by F16, BF16 or quantised weights it still rounds to what these are multiplied with:
    F16, BF16, or blocks of 32 or 256 eight-bit numbers with a scale.
    """
    with _loaded(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = _CTX
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(model, params)
        assert context, path
        try:
            return _decode(model, context, ids)
        finally:
            llama_cpp.llama_free(context)


def tokenize(path: Path, texts: Sequence[str], *, add_special: bool) -> list[list[int]]:
    """The ids of texts, in which the names of control tokens become those tokens.

    Args:
        path: A GGUF file.
        texts: Unicode.
        add_special: Whether what the model wants at the begin and the end is put there.
    """
    found = []
    with _loaded(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        for text in texts:
            raw = text.encode()
            ids = (llama_cpp.llama_token * (len(raw) + 2))()
            count = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(ids), add_special, True)
            assert count >= 0, text
            found.append(ids[:count])
    return found


@contextmanager
def _loaded(path: Path, *, vocab_only: bool = False) -> Iterator[Any]:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp refuses {path}"
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def _decode(model: Any, context: Any, ids: Sequence[int]) -> np.ndarray:
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            batch.logits[position] = True
        assert llama_cpp.llama_decode(context, batch) == 0
        rows = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), rows)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
