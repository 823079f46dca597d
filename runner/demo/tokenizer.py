"""Train the demo model's tokenizer: a small byte-level BPE in the form of DeepSeek-V3's tokenizer.json.

It has the published pre-tokenizer (digits in threes, runs of CJK, one long expression for everything else, then bytes
without a further expression), the published special tokens, and BOS, EOS and padding at ids 0, 1 and 2. The other
special tokens take the last ids of the vocabulary, as they take ids from 128,798 in the original.

This file knows text and token ids; it must not know the network.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

# In the order of their ids in the original, where they take 128,798 to 128,814.
THINK_TOKENS = ("<think>", "</think>")
CONTROL_TOKENS = (
    "<\uff5cfim\u2581hole\uff5c>",
    "<\uff5cfim\u2581begin\uff5c>",
    "<\uff5cfim\u2581end\uff5c>",
    USER,
    ASSISTANT,
    "<|EOT|>",
    "<\uff5ctool\u2581calls\u2581begin\uff5c>",
    "<\uff5ctool\u2581calls\u2581end\uff5c>",
    "<\uff5ctool\u2581call\u2581begin\uff5c>",
    "<\uff5ctool\u2581call\u2581end\uff5c>",
    "<\uff5ctool\u2581outputs\u2581begin\uff5c>",
    "<\uff5ctool\u2581outputs\u2581end\uff5c>",
    "<\uff5ctool\u2581output\u2581begin\uff5c>",
    "<\uff5ctool\u2581output\u2581end\uff5c>",
    "<\uff5ctool\u2581sep\uff5c>",
)

_DIGITS = r"\p{N}{1,3}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*"""
    r"""|\s*[\r\n]+"""
    r"""|\s+(?!\S)"""
    r"""|\s+"""
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose ids, special tokens included, are exactly 0 .. vocab_size - 1."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_DIGITS, _CJK, _WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    # As published, no post-processor puts a BOS before the text: `add_bos_token` in tokenizer_config.json asks for it.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK_TOKENS) - len(CONTROL_TOKENS),
        special_tokens=[_special(token) for token in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # In the original <think> is an ordinary added token: text that a decoder does not skip.
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK_TOKENS])
    tokenizer.add_special_tokens([_special(token) for token in CONTROL_TOKENS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text gave {tokenizer.get_vocab_size()} tokens, not {vocab_size}: use more text")
    return tokenizer


def _special(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)
