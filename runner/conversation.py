"""A chat as one growing timeline of token ids, so that the engine's cache can be kept between turns.

Knows messages and the ids of their prompts. It must not know the engine or the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.chat import Message
from runner.text import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question that is ready for the engine.

    Attributes:
        messages: The conversation up to and with the question.
        pieces: Its prompt text, as from Text.render_pieces.
        ids: The timeline that the answer continues.
    """

    messages: tuple[Message, ...]
    pieces: tuple[str, ...]
    ids: tuple[int, ...]


class Conversation:
    """The turns so far, and the exact ids that the model has read and written.

    A model may spell an answer in other tokens than the tokenizer would. Encoding the whole conversation again would
    then disagree with the cache from that token on. So the ids of the last turn are kept and only what follows them
    is encoded, wherever the template repeats the last turn as it was. Where it does not (R1 drops earlier thoughts),
    everything is encoded afresh, and the engine reuses what is still common.
    """

    def __init__(self, text: Text, *, system: str | None = None, thinking: bool = False) -> None:
        self._text = text
        self._thinking = thinking
        self._start: tuple[Message, ...] = () if system is None else ({"role": "system", "content": system},)
        self.reset()

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self._last: Turn | None = None
        self._answer_ids: tuple[int, ...] = ()

    def ask(self, content: str) -> Turn:
        """Prepare the user's next question. It counts only once `answered` has been called with it.

        Raises:
            ToolkitError: See Text.render_chat.
            ManifestError: See Text.render_chat.
        """
        question: Message = {"role": "user", "content": content}
        if self._last is None:
            return self._fresh((*self._start, question))
        # With the names of control tokens: the model wrote them, and a template looks for some (</think>).
        answer = self._text.decode(self._answer_ids, control_tokens=True)
        # V2's template ends in "Assistant:" and repeats answers after "Assistant: ", so there the blank that begins
        # an answer is the template's. Any other answer is taken as it came.
        for repeated in dict.fromkeys((answer, answer.removeprefix(" "))):
            messages = (*self._last.messages, {"role": "assistant", "content": repeated}, question)
            pieces = self._text.render_pieces(messages, thinking=self._thinking)
            rest = _rest(pieces, [*self._last.pieces[:-1], self._last.pieces[-1] + answer])
            if rest is not None:
                ids = self._text.encode_pieces(rest, add_bos=False)
                timeline = (*self._last.ids, *self._answer_ids, *ids)
                return Turn(messages=messages, pieces=tuple(pieces), ids=timeline)
        return self._fresh((*self._last.messages, {"role": "assistant", "content": answer}, question))

    def answered(self, turn: Turn, answer_ids: Sequence[int]) -> None:
        """Record the model's answer to a turn, complete or cut short."""
        self._last = turn
        self._answer_ids = tuple(answer_ids)

    def _fresh(self, messages: tuple[Message, ...]) -> Turn:
        pieces = self._text.render_pieces(messages, thinking=self._thinking)
        return Turn(messages=messages, pieces=tuple(pieces), ids=tuple(self._text.encode_pieces(pieces)))


def _rest(pieces: Sequence[str], before: Sequence[str]) -> list[str] | None:
    """What follows `before` in `pieces`, or None if they do not begin with it."""
    last = len(before) - 1
    if len(pieces) < len(before) or list(pieces[:last]) != list(before[:last]):
        return None
    if not pieces[last].startswith(before[last]):
        return None
    return [pieces[last][len(before[last]) :], *pieces[last + 1 :]]
