"""How texts are cut before merging, by the names that GGUF files have for it, in tokenizer.json's terms.

A GGUF file names its pre-tokenizer and does not say what that is. These are the sequences of the published
tokenizer.json files that converters give each name: ``deepseek-v3`` of DeepSeek-V3 and R1, ``deepseek-llm`` of
DeepSeek-LLM and V2, V2-Lite and Coder-V2; ``gpt-2`` is what the tokenizers library does by itself. ``kimi-k2`` is of
Kimi-K2 and Moonlight, which have no tokenizer.json but an expression for tiktoken; the tokenizers library takes it as
it is, and cuts alike.
Sources: DeepSeek-V3's tokenizer.json; for ``deepseek-llm`` the expressions in llama.cpp's src/llama-vocab.cpp, whose
last one is for numbers, where tokenizer.json has ``Digits``. No token of that vocabulary has two digits, so the ids are
the same. For ``kimi-k2`` pat_str in Kimi-K2-Instruct's tokenization_kimi.py.
"""

from typing import Any

from manifests.errors import UnsupportedModelError

_NUMBERS_BY_THREE = r"\p{N}{1,3}"
_CJK_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_MARKED_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_WORD = "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
_SIGNS = " ?[\\p{P}\\p{S}]+[\r\n]*"
_BLANKS = "\\s*[\r\n]+|\\s+(?!\\S)|\\s+"

_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Escaped, because some of them are equal to other letters for whatever normalises this file."""
_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_EASTERN = "\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_MARK, _SHORT = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_KIMI = (
    r"[\p{Han}]+",
    f"{_MARK}{_UPPER}*{_LOWER}+{_SHORT}",
    f"{_MARK}{_UPPER}+{_LOWER}*{_SHORT}",
    _NUMBERS_BY_THREE,
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)


def find_pre_tokenizer(name: str) -> dict[str, Any]:
    """The ``pre_tokenizer`` of tokenizer.json that belongs to a name.

    Raises:
        UnsupportedModelError: The name is not known.
    """
    if name not in _STEPS:
        raise UnsupportedModelError(
            f"the GGUF metadata has tokenizer.ggml.pre {name!r:.80}, and how that cuts texts is not known here (known "
            f"are {', '.join(_STEPS)}); put the model's own tokenizer.json beside the file"
        )
    return {"type": "Sequence", "pretokenizers": _STEPS[name]}


def takes_whole_words(name: str) -> bool:
    """Whether a piece of text that is a token becomes that token though no merges lead to it, as in tiktoken."""
    return name == "kimi-k2"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_STEPS: dict[str, list[dict[str, Any]]] = {
    "deepseek-llm": [
        _split("[\r\n]"),
        _split(rf"\s?[{_CASED_LETTERS}]+"),
        _split(rf"\s?[{_PUNCTUATION}]+"),
        _split(r"\s+$"),
        _split(f"[{_EASTERN}]+"),
        {"type": "Digits", "individual_digits": True},
        _byte_level(use_regex=False),
    ],
    "deepseek-v3": [
        _split(_NUMBERS_BY_THREE),
        _split(_CJK_AND_KANA),
        _split("|".join((_MARKED_WORD, _WORD, _SIGNS, _BLANKS))),
        _byte_level(use_regex=False),
    ],
    "gpt-2": [_byte_level(use_regex=True)],
    "kimi-k2": [_split("|".join(_KIMI)), _byte_level(use_regex=False)],
}
