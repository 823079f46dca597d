"""Text and token ids: the tokenizer, BOS and EOS, chat prompts, and decoding while tokens arrive.

Knows ``tokenizer.json`` (through the tokenizers library itself, because higher-level loaders replace this family's
pre-tokenizer) and the small JSON files beside it. It must not know tensors, weights or the engine.

Control tokens, such as the one that opens a user's turn, are read from text in two ways, on purpose:

- ``encode`` takes a raw prompt. The names of control tokens in it become those tokens, as in other engines:
  whoever writes a raw prompt writes all of it.
- ``encode_chat`` takes messages. Only the template and the model's own earlier answers write control tokens; the same
  characters in a user's, system's or tool's message stay plain text, so a pasted document cannot open a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from manifests.auxiliary import Auxiliary
from manifests.config import read_object
from manifests.errors import ManifestError, SourceNotFoundError, ToolkitError
from manifests.folder import LocalFolder
from runner.chat import TEMPLATE_FILE, ChatTemplate, Message

TOKENIZER_FILE = "tokenizer.json"
TEXT_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "generation_config.json", TEMPLATE_FILE)
"""What a checkpoint is read for when there is text."""

MAX_TOKENIZER_BYTES = 1 << 28

_MEMORY_PER_QUOTE = 150
"""Memory that the library takes for each of the two quotation marks of a string, besides the file itself. It keeps
tokens and merges, and these are as many however the file is indented. Measured with 64,000 to 164,000 tokens: 95 to 105
where a merge is one string, 130 to 135 where it is two; a little more where a table has just doubled."""

_MEMORY_PER_HEADER_BYTE = 17
"""The same for a byte of the GGUF header that tokenizer.json is made from: 14 with 129,280 tokens, 16 with 102,400."""

_REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not UTF-8, or not yet."""


class HasAuxiliary(Protocol):
    """A checkpoint, as far as this file needs one."""

    @property
    def auxiliary(self) -> Auxiliary:
        """The tokenizer and the small files beside it."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json, or what stands for it."""
        ...


class Text:
    """A model's tokenizer with its conventions.

    Attributes:
        bos_id: The token that begins a text, or None.
        add_bos: Whether texts for this model begin with it.
        eos_ids: Tokens that end generation.
        template: The chat template, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        bos_id: int | None,
        add_bos: bool,
        eos_ids: Iterable[int],
        template: ChatTemplate | None,
        eos_token: str = "",
    ) -> None:
        self.bos_id = bos_id
        self.add_bos = add_bos and bos_id is not None
        self.eos_ids = frozenset(eos_ids)
        self.template = template
        self._tokenizer = tokenizer
        self._bos_token = "" if bos_id is None else tokenizer.id_to_token(bos_id) or ""
        self._eos_token = eos_token
        names = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        # The look-ahead finds overlapping names too; one character is taken, so that a cut can follow it.
        pattern = "|".join(re.escape(name) for name in sorted(names) if len(name) > 1)
        self._control_name = re.compile(f"(?={pattern})(.)", re.DOTALL) if pattern else None

    @classmethod
    def from_checkpoint(cls, checkpoint: HasAuxiliary | Path) -> Text:
        """Read the tokenizer of a checkpoint, or of a folder that need not have tensors.

        Raises:
            SourceNotFoundError: There is no tokenizer.json.
            ManifestError: One of the files is damaged, or they contradict each other.
            UnsupportedModelError: A GGUF file has a tokenizer of a kind that is not known.
        """
        if isinstance(checkpoint, Path):
            auxiliary = Auxiliary(LocalFolder(checkpoint))
            model = read_object(auxiliary, "config.json")
        else:
            auxiliary, model = checkpoint.auxiliary, checkpoint.config
        tokenizer = _read_tokenizer(auxiliary)
        own = read_object(auxiliary, "tokenizer_config.json")
        generation = read_object(auxiliary, "generation_config.json")

        bos_ids = _ids(generation, "bos_token_id") or _ids(model, "bos_token_id")
        bos_id = _named_id(tokenizer, own, "bos_token", auxiliary)
        if bos_id is None and bos_ids:
            bos_id = bos_ids[0]
        add_bos = own.get("add_bos_token", bos_id is not None)
        if not isinstance(add_bos, bool):
            raise ManifestError(f"{auxiliary.where('tokenizer_config.json')}: add_bos_token must be true or false")

        eos_id = _named_id(tokenizer, own, "eos_token", auxiliary)
        eos_ids = {*_ids(generation, "eos_token_id"), *_ids(model, "eos_token_id")}
        if not eos_ids and eos_id is not None:
            eos_ids = {eos_id}
        if eos_id is None and eos_ids:
            eos_id = min(eos_ids)
        return cls(
            tokenizer,
            bos_id=bos_id,
            add_bos=add_bos,
            eos_ids=eos_ids,
            template=ChatTemplate.find(auxiliary, own),
            eos_token="" if eos_id is None else tokenizer.id_to_token(eos_id) or "",
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a text; the model's embedding may have more rows."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Turn a raw text into ids; names of control tokens in it become those tokens.

        Args:
            text: The text.
            add_bos: Put BOS first if this model wants it; never a second one.

        Raises:
            ToolkitError: The text is not valid Unicode.
        """
        return self.encode_pieces([text], add_bos=add_bos)

    def decode(self, ids: Sequence[int], *, control_tokens: bool = False) -> str:
        """Turn ids into text; ids without a text give nothing.

        Args:
            ids: Token ids, also beyond the tokenizer's.
            control_tokens: Write the names of control tokens instead of leaving them out.
        """
        return self._tokenizer.decode(list(ids), skip_special_tokens=not control_tokens)

    def stream(self) -> TextStream:
        """Decode ids one by one as they arrive."""
        return TextStream(self)

    def render_chat(self, messages: Sequence[Message], *, thinking: bool = False) -> str:
        """The prompt text of a conversation, ready for the model's answer.

        Raises:
            ToolkitError: The model has no chat template, or it refuses the messages.
            ManifestError: The template fails.
        """
        return "".join(self.render_pieces(messages, thinking=thinking))

    def encode_chat(self, messages: Sequence[Message], *, thinking: bool = False) -> list[int]:
        """The prompt ids of a conversation; what users write never becomes a control token.

        Raises:
            ToolkitError: See render_chat.
            ManifestError: See render_chat.
        """
        return self.encode_pieces(self.render_pieces(messages, thinking=thinking))

    def render_pieces(self, messages: Sequence[Message], *, thinking: bool) -> list[str]:
        """The prompt text of a conversation, cut inside every control token's name that a user wrote.

        Encoded piece by piece, the two halves of such a name cannot become the token.

        Raises:
            ToolkitError: See render_chat.
            ManifestError: See render_chat.
        """
        if self.template is None:
            raise ToolkitError(
                "this model has no chat template (no chat_template.jinja, none in tokenizer_config.json); "
                "use `runner generate` with a prompt that is written out whole, without --system"
            )
        written = "".join(message["content"] for message in messages)
        # A code point that Unicode promises never to assign, and that this conversation does not hold either.
        mark = next(chr(point) for point in range(0xFDD0, 0x110000) if chr(point) not in written)
        marked = [
            message if message["role"] == "assistant" else {**message, "content": self._cut(message["content"], mark)}
            for message in messages
        ]
        prompt = self.template.render(marked, bos_token=self._bos_token, eos_token=self._eos_token, thinking=thinking)
        return prompt.split(mark)

    def encode_pieces(self, pieces: Sequence[str], *, add_bos: bool = True) -> list[int]:
        """Encode the pieces of a prompt one after the other; arguments and errors as in encode."""
        ids: list[int] = []
        for piece in pieces:
            try:
                piece.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ToolkitError(
                    f"the text is not valid Unicode at character {error.start}; give it in UTF-8"
                ) from error
            # Never the post-processor's own special tokens: BOS is decided here, once.
            ids.extend(self._tokenizer.encode(piece, add_special_tokens=False).ids)
        if add_bos and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _cut(self, content: str, mark: str) -> str:
        return content if self._control_name is None else self._control_name.sub(rf"\1{mark}", content)


class TextStream:
    """Incremental decoder: everything given out, joined, is what decoding all ids at once would give.

    The bytes of one character may lie in several tokens; the unfinished end is held back until it is complete.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        # Ids of the last finished stretch, kept because some decoders treat the first token of a text differently.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._shown_chars = 0

    def push(self, token_id: int) -> str:
        """Add one id; return the text that is now certain, possibly empty."""
        self._pending.append(token_id)
        text = self._text.decode(self._context + self._pending)
        # Only the last replacement character can stand for an unfinished character; earlier ones are final.
        finished = not text.endswith(_REPLACEMENT)
        certain = text if finished else text[:-1]
        piece = certain[self._shown_chars :]
        self._shown_chars = max(self._shown_chars, len(certain))
        if finished:
            self._context, self._pending = self._pending, []
            self._shown_chars = len(self._text.decode(self._context))
        return piece

    def flush(self) -> str:
        """The rest: an unfinished character comes out as a replacement character."""
        text = self._text.decode(self._context + self._pending)
        piece = text[self._shown_chars :]
        self._shown_chars = len(text)
        return piece


class StopScanner:
    """Cuts a stream of text before the first stop string, also where it spans several pieces.

    Holds back only what could be the beginning of a stop string.

    Attributes:
        stopped: True once a stop string was seen; everything after it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self.stopped = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Add text; return what can be given out."""
        if self.stopped:
            return ""
        text = self._held + piece
        # The one that is complete first, so that the cut does not depend on how the text came in pieces.
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """The end of the text: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def tokenizer_bytes(auxiliary: Auxiliary) -> int:
    """Memory that reading a checkpoint's tokenizer takes; 0 when it has none that can be read."""
    if auxiliary.size(TOKENIZER_FILE) is None:
        return _MEMORY_PER_HEADER_BYTE * auxiliary.derived_from
    try:
        raw = auxiliary.read(TOKENIZER_FILE, max_bytes=MAX_TOKENIZER_BYTES)
    except ToolkitError:
        return 0  # said to whoever needs it; ids need none
    return 0 if raw is None else len(raw) + _MEMORY_PER_QUOTE * raw.count(b'"')


def _read_tokenizer(auxiliary: Auxiliary) -> Tokenizer:
    raw = auxiliary.read(TOKENIZER_FILE, max_bytes=MAX_TOKENIZER_BYTES)
    if raw is None:
        raise SourceNotFoundError(
            f"{auxiliary.where(TOKENIZER_FILE)}: no such file; copy the model's tokenizer.json there"
        )
    try:
        return Tokenizer.from_buffer(raw)
    except Exception as error:
        # The library raises nothing narrower than Exception.
        source = auxiliary.where(TOKENIZER_FILE)
        raise ManifestError(f"{source}: not a tokenizer that the tokenizers library can read: {error}") from error


def _named_id(tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any], key: str, auxiliary: Auxiliary) -> int | None:
    """The id of a token that tokenizer_config.json names, as plain text or as ``{"content": text, ...}``."""
    value = tokenizer_config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None:
        return None
    token_id = tokenizer.token_to_id(value) if isinstance(value, str) else None
    if token_id is None:
        source = auxiliary.where("tokenizer_config.json")
        raise ManifestError(f"{source}: {key} {value!r:.80} is not a token of {TOKENIZER_FILE}")
    return token_id


def _ids(config: Mapping[str, Any], key: str) -> list[int]:
    """Token ids of a config: absent, one number, or a list of numbers."""
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ManifestError(f"the model's {key} must be a token id or a list of them, not {value!r:.80}")
    return ids
