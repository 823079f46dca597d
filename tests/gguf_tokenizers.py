"""Small tokenizers with the published pre-tokenizers, and GGUF files with them, written as llama.cpp's converter does.

The expressions are written out here a second time, the letters as numbers: they are what the reader is checked against.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

BOS, EOS, PAD = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5c\u2581pad\u2581\uff5c>",
)
USER, ASSISTANT, EOT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<|EOT|>"
HOLE, THINK = "<\uff5cfim\u2581hole\uff5c>", "<think>"
TEMPLATE = "{{ bos_token }}{% for message in messages %}" + USER + "{{ message['content'] }}{% endfor %}" + ASSISTANT

CODE = Path(__file__).read_text(encoding="utf-8")
CHINESE = (
    "\u6df1\u5ea6\u6c42\u7d22\uff0c\u4f60\u597d\u4e16\u754c\u3002\u6df7\u5408\u4e13\u5bb6\u6a21\u578b\u670925"
    "\u4e2a\u4e13\u5bb6\u3002\u300c\u5f15\u53f7\u300d"
)
JAPANESE = "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3001\u30e2\u30c7\u30eb\u30fc\u306e\u91cd\u307f"
KOREAN = "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4 \uc804\ubb38\uac00 \ud63c\ud569"
WORDS = (
    "na\u00efve Stra\u00dfe \u03a9mega \u1f7d \u1fd3\u1fdb \u2126\u212a \u0414\u043e\u0431\u0440\u044b\u0439 "
    "\u0434\u0435\u043d\u044c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627"
)
DIGITS = (
    " ".join("1234567890123"[:size] for size in range(1, 14))
    + " 3.14 0x1F \u0663\u0664\u0665 \u00bd \u2167 \uff11\uff12"
)
EMOJI = "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \u2764\ufe0f \U0001f1e9\U0001f1ea"
MARKS = (
    "e\u0301 a\u0308o\u0308 \u0928\u092e\u0938\u094d\u0924\u0947 Z\u0351\u036b\u0343 \u0e2a\u0e27\u0e31\u0e2a"
    "\u0e14\u0e35"
)
BLANKS = "a  b   c    d\t\te\r\nf\n\n\ng \n h\t \n\r\n   \u00a0\u3000x   "
CONTROL = f"{BOS}{USER}hi {USER}{ASSISTANT}{THINK}\n{HOLE} {EOT}{EOS}{PAD} <|User|> {EOT[:-1]} <\uff5cUser"
TEXTS = {
    "code": CODE,
    "chinese": CHINESE,
    "japanese": JAPANESE,
    "korean": KOREAN,
    "words": WORDS,
    "digits": DIGITS,
    "emoji": EMOJI,
    "marks": MARKS,
    "blanks": BLANKS,
    "control tokens": CONTROL,
    "fillers": "[PAD1205] [PAD3]",
    "empty": "",
}
"""What tokenizers are compared on."""

TRAINING = [text for text in TEXTS.values() if text is not CONTROL] * 3
"""What they are trained on."""

_LETTERS = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5
3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15
1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3
1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139
213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787
A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2
118A0-118DF 1E900-1E943
"""
_PUNCTUATION = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_EASTERN = "4E00-9FA5 0800-4E00 AC00-D7FF"
_KANA = "4E00-9FA5 3040-309F 30A0-30FF"
_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" + "\r\n" + r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[" + "\r\n" + r"]*|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+"
)


_KIMI = (
    r"\p{Han}+",
    r"[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])*(?:(?!\p{Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}])+SHORT",
    r"[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])+(?:(?!\p{Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}])*SHORT",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
KIMI = "|".join(_KIMI).replace("SHORT", "(?:'[sS\u017f]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?")
"""Kimi-K2's expression, without what few engines have: sets within sets, and case that is ignored."""


def _class(ranges: str) -> str:
    ends = [[chr(int(end, 16)) for end in part.split("-")] for part in ranges.split()]
    return "[" + "".join("-".join(f"\\{end}" if end in "[]-^~!/:" else end for end in pair) for pair in ends) + "]"


def edges() -> list[str]:
    """The characters at the ends of the ranges that the expressions name, and those beside them."""
    ends = re.findall("[0-9A-F]+", " ".join((_LETTERS, _PUNCTUATION, _EASTERN, _KANA)))
    points = {int(end, 16) + step for end in ends for step in (-1, 0, 1)}
    return [chr(point) for point in sorted(points) if not 0xD800 <= point < 0xE000]


def _cut(*patterns: str) -> list[PreTokenizer]:
    return [Split(Regex(pattern), "isolated") for pattern in patterns]


def published(name: str) -> PreTokenizer:
    """The pre-tokenizer of the published tokenizer.json that converters give this name."""
    if name == "gpt-2":
        return ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "deepseek-v3":
        steps = _cut(r"\p{N}{1,3}", _class(_KANA) + "+", _V3_WORDS)
    elif name == "kimi-k2":
        steps = _cut(KIMI)
    else:
        words = (rf"\s?{_class(_LETTERS)}+", rf"\s?{_class(_PUNCTUATION)}+", r"\s+$", _class(_EASTERN) + "+")
        steps = [*_cut("[\r\n]", *words), Digits(individual_digits=True)]
    return pre_tokenizers.Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


def train(name: str, texts: list[str]) -> Tokenizer:
    """A tokenizer as DeepSeek's are: three special tokens first, and others, not all special, behind the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = published(name)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [AddedToken(token, normalized=True, special=False) for token in (HOLE, USER, ASSISTANT, THINK)]
    )
    tokenizer.add_special_tokens([AddedToken(EOT, normalized=True, special=True)])
    return tokenizer


def looks_special(token: str) -> bool:
    """Whether the converter takes a token for a control token whatever the original says."""
    return token.startswith(("<|", "<\uff5c")) and token.endswith(("|>", "\uff5c>"))


def tokenizer_keys(tokenizer: Tokenizer, *, rows: int, filler: int = 5) -> tuple[list[str], list[int]]:
    """Tokens and their types for an embedding of so many rows, with fillers of this type where there is no token."""
    names = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    for number in range(rows):
        token = names.get(number)
        is_added = number in added
        is_control = is_added and token is not None and (added[number].special or looks_special(token))
        tokens.append(f"[PAD{number}]" if token is None else token)
        types.append(filler if token is None else 3 if is_control else 4 if is_added else 1)
    return tokens, types


def write_tokenizer(
    path: Path, tokenizer: Tokenizer, pre: str, *, filler: int = 5, config: Mapping[str, Any] | None = None
) -> None:
    """Write a GGUF file with no tensors. Merges, ids and template go through the gguf package, from a folder's files.

    Args:
        path: Of the file.
        tokenizer: The original.
        pre: The name of its pre-tokenizer.
        filler: See `tokenizer_keys`.
        config: tokenizer_config.json; BOS, EOS and padding, and the template, when not given.
    """
    folder = path.with_suffix(".source")
    writer = gguf.GGUFWriter(path, "deepseek2")
    add_tokenizer(writer, folder, tokenizer, pre, rows=tokenizer.get_vocab_size() + 17, filler=filler, config=config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(
    writer: gguf.GGUFWriter,
    folder: Path,
    tokenizer: Tokenizer,
    pre: str,
    *,
    rows: int,
    filler: int = 5,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Add the keys of a tokenizer.

    Args:
        writer: What they are added to.
        folder: Where the tokenizer's own files are written; it must not exist.
        tokenizer: The original.
        pre: The name of its pre-tokenizer.
        rows: See `tokenizer_keys`.
        filler: See `tokenizer_keys`.
        config: See `write_tokenizer`.
    """
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    default = {
        "bos_token": {"content": BOS},
        "eos_token": {"content": EOS},
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config or default), encoding="utf-8")
    tokens, types = tokenizer_keys(tokenizer, rows=rows, filler=filler)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)
