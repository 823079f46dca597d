"""The tokenizer files that a GGUF file was converted from, out of its metadata: tokenizer.json, tokenizer_config.json.

A GGUF file has the tokens in order, what each of them is, the merges, and ids with a meaning. Together with the
pre-tokenizer of its name (`manifests.gguf_pretokenizers`) that is a byte-level BPE tokenizer, which gives the ids of
the original. What converters do not keep: which tokens that look like control tokens (``<|...|>``) were none, the
template's other names, and settings of single added tokens.
Source: the keys ``tokenizer.ggml.*`` of the GGUF specification, and what llama.cpp's converter writes into them.
This file knows metadata; it knows no files, and no library that tokenizes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from manifests.errors import ManifestError, UnsupportedModelError
from manifests.gguf_pretokenizers import find_pre_tokenizer, takes_whole_words

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
NAMES = (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME)

_PREFIX = "tokenizer.ggml."
_BYTE_LEVEL = "gpt2"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_TYPES = (_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED)

_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
"""Keys of tokenizer_config.json, and the keys of GGUF that have the ids of those tokens."""


def tokenizer_documents(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The files by name, in canonical bytes; none when the metadata has no tokenizer.

    Args:
        metadata: Of the file, or of the first of a split set; see `manifests.gguf.GgufHeader`.

    Raises:
        ManifestError: A value is missing, has the wrong type, or contradicts another.
        UnsupportedModelError: It is another kind of tokenizer, or its pre-tokenizer is not known.
    """
    if not any(key.startswith(_PREFIX) for key in metadata):
        return {}
    model = _require(metadata, "model", str, "a string")
    if model != _BYTE_LEVEL:
        raise UnsupportedModelError(
            f"the GGUF metadata has {_PREFIX}model {model!r:.80}; this version reads byte-level BPE ({_BYTE_LEVEL!r}), "
            f"put the model's own {TOKENIZER_NAME} beside the file"
        )
    pre = _require(metadata, "pre", str, "a string")
    pre_tokenizer = find_pre_tokenizer(pre)
    tokens = _require_all(metadata, "tokens", str, "strings")
    types = _require_all(metadata, "token_type", int, "whole numbers")
    vocab = _read_vocab(tokens, types)
    merges = _require_all(metadata, "merges", str, "strings")
    _check_merges(merges, vocab)
    roles = _read_roles(metadata, tokens, vocab)
    adds = {key: found for key in ("add_bos_token", "add_eos_token") if (found := _flag(metadata, key)) is not None}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _describe_added(token, number, is_special=types[number] == _CONTROL)
            for token, number in vocab.items()
            if types[number] != _NORMAL
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _describe_template(roles, vocab, adds),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            **({"ignore_merges": True} if takes_whole_words(pre) else {}),
            # Added tokens too: those that the model does not have are numbered one after the other by the library.
            "vocab": vocab,
            "merges": merges,
        },
    }
    settings: dict[str, Any] = {
        # Not the original's name: transformers gives that class another pre-tokenizer than the file has.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **roles,
        **adds,
    }
    if (template := _optional(metadata, "tokenizer.chat_template", str, "a string")) is not None:
        settings["chat_template"] = template
    return {TOKENIZER_NAME: _encode(tokenizer), TOKENIZER_CONFIG_NAME: _encode(settings)}


def _read_vocab(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Ids by token, without the fillers that a converter puts where the embedding has rows and the tokenizer none."""
    if len(tokens) != len(types):
        raise ManifestError(
            f"the GGUF metadata has {len(tokens)} tokens and {len(types)} token types; there must be one type a token"
        )
    vocab: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind not in _TYPES:
            raise UnsupportedModelError(
                f"the GGUF metadata has token {number} ({token!r:.80}) of type {kind}; byte-level BPE has types "
                f"{', '.join(map(str, _TYPES))} alone"
            )
        # Converters before 2025 gave their fillers the type of tokens that a user defined.
        if kind == _UNUSED or (kind == _USER_DEFINED and token == f"[PAD{number}]"):
            continue
        if not token:
            raise ManifestError(f"the GGUF metadata has token {number} without a text; every token must have one")
        if token in vocab:
            raise ManifestError(
                f"the GGUF metadata has token {token!r:.80} twice, as {vocab[token]} and {number}; it must have one id"
            )
        vocab[token] = number
    return vocab


def _check_merges(merges: Sequence[str], vocab: Mapping[str, int]) -> None:
    for number, merge in enumerate(merges):
        left, blank, right = merge.partition(" ")
        if not (left and blank and right) or " " in right:
            raise ManifestError(
                f"the GGUF metadata has merge {number} {merge!r:.80}; it must be two tokens and a blank"
            )
        for part in (left, right, left + right):
            if part not in vocab:
                raise ManifestError(
                    f"the GGUF metadata has merge {number} {merge!r:.80}, but {part!r:.80} is not one of its tokens"
                )


def _read_roles(metadata: Mapping[str, Any], tokens: Sequence[str], vocab: Mapping[str, int]) -> dict[str, str]:
    roles = {}
    for role, key in _ROLES.items():
        number = _optional(metadata, f"{_PREFIX}{key}", int, "a whole number")
        if number is None:
            continue
        if not 0 <= number < len(tokens) or vocab.get(tokens[number]) != number:
            raise ManifestError(f"the GGUF metadata has {_PREFIX}{key} {number}, which is none of its tokens")
        roles[role] = tokens[number]
    return roles


def _flag(metadata: Mapping[str, Any], key: str) -> bool | None:
    value: bool | None = _optional(metadata, f"{_PREFIX}{key}", bool, "a truth value")
    return value


def _describe_added(token: str, number: int, *, is_special: bool) -> dict[str, Any]:
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not is_special,
        "special": is_special,
    }


def _describe_template(
    roles: Mapping[str, str], vocab: Mapping[str, int], adds: Mapping[str, bool]
) -> dict[str, Any] | None:
    """The post-processor that puts BOS and EOS around a text; None when the model wants neither."""
    before, after = ([role] if adds.get(f"add_{role}") else [] for role in ("bos_token", "eos_token"))
    for role in before + after:
        if role not in roles:
            raise ManifestError(
                f"the GGUF metadata has {_PREFIX}add_{role} without {_PREFIX}{_ROLES[role]}; it must have both or none"
            )
    if not before and not after:
        return None

    def around(name: str, number: int) -> list[dict[str, Any]]:
        def special(role: str) -> dict[str, Any]:
            return {"SpecialToken": {"id": roles[role], "type_id": number}}

        return [*map(special, before), {"Sequence": {"id": name, "type_id": number}}, *map(special, after)]

    used = dict.fromkeys(roles[role] for role in before + after)
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in used},
    }


def _optional(metadata: Mapping[str, Any], key: str, kind: type, must: str) -> Any:
    """A value of exactly this type; None when it is absent."""
    value = metadata.get(key)
    # A truth value is a whole number to isinstance.
    if value is not None and type(value) is not kind:
        raise ManifestError(f"the GGUF metadata has {key} {value!r:.80}; it must be {must}")
    return value


def _require(metadata: Mapping[str, Any], key: str, kind: type, must: str) -> Any:
    value = _optional(metadata, _PREFIX + key, kind, must)
    if value is None:
        raise ManifestError(f"the GGUF metadata has a tokenizer without {_PREFIX}{key}; convert the model again")
    return value


def _require_all(metadata: Mapping[str, Any], key: str, kind: type, must: str) -> tuple[Any, ...]:
    """An array whose elements all have exactly this type."""
    values: tuple[Any, ...] = _require(metadata, key, tuple, f"an array of {must}")
    if any(type(value) is not kind for value in values):
        raise ManifestError(f"the GGUF metadata has {_PREFIX}{key} of other values; it must be an array of {must}")
    return values


def _encode(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"{text}\n".encode()
