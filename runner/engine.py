"""Generation over token ids: prefill, decode, reuse of what the cache already holds. It never sees text.

Shapes: T tokens, D hidden, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from manifests.errors import ResourceError, ToolkitError
from runner.budget import HEAD_TOKENS, PASS_TOKENS
from runner.cache import LatentCache
from runner.model import Model
from runner.sampling import SamplingParams
from runner.speculative import Speculation, accept


class Engine:
    """One text at a time through a model, with one latent KV cache.

    Args:
        model: What to run.
        ctx: The most positions a text may have.
        pass_tokens: The most tokens that go through the layers together.
        speculation: Guesses tokens to check several in a pass; None for one token a pass.

    Raises:
        ResourceError: ``ctx`` is not within the positions that the model was made for.
    """

    def __init__(
        self, model: Model, *, ctx: int, pass_tokens: int = PASS_TOKENS, speculation: Speculation | None = None
    ) -> None:
        limit = model.config.max_position_embeddings
        if not 1 <= ctx <= limit:
            raise ResourceError(f"a context of {ctx} positions was asked for; this model takes 1 to {limit}")
        self._model = model
        self._pass_tokens = pass_tokens
        self._speculation = speculation
        self._cache = LatentCache(model.config, ctx)
        self._held: list[int] = []  # the ids whose positions the cache holds

    def generate(
        self, ids: Sequence[int], *, max_tokens: int, sampling: SamplingParams, eos_ids: Collection[int]
    ) -> Iterator[int]:
        """Continue a text.

        Args:
            ids: All of it so far. Whatever the cache holds of its beginning is not computed again.
            max_tokens: The most new ids to give.
            sampling: How to choose them.
            eos_ids: Ids that end the text; they are not given.

        Returns:
            New ids, each as soon as it is chosen. The iterator raises ResourceError when the context is full
            and more was asked for.

        Raises:
            ResourceError: The text so far does not fit into the context.
            ToolkitError: There is no text, or an id is outside the vocabulary.
        """
        timeline = self._checked(ids)
        return self._generate(timeline, len(timeline) + max_tokens, sampling, frozenset(eos_ids))

    def _generate(
        self, timeline: list[int], end: int, sampling: SamplingParams, eos_ids: frozenset[int]
    ) -> Iterator[int]:
        begin = len(timeline)
        while len(timeline) < end:
            # The first pass is the prompt's alone, so that what is counted for it is no guess.
            most = end - len(timeline) if len(timeline) > begin else 1
            for chosen in self._next(timeline, most, sampling):
                if chosen in eos_ids:
                    return
                timeline.append(chosen)
                yield chosen

    def _next(self, timeline: list[int], most: int, sampling: SamplingParams) -> list[int]:
        """Choose the next tokens, one or more, of one pass."""
        # The cache is brought to the timeline at every step: another text may have run in between.
        self._return_to(timeline)
        if self._speculation is None:
            return accept(self._model.logits(self._advance(timeline)), [], sampling, len(timeline))
        with self._speculation.step():
            # Room for guesses is in the text to come, in the context, and in one pass.
            room = min(most, self._cache.ctx - len(timeline) + 1, self._pass_tokens) - 1
            guesses = self._speculation.propose(timeline, room, sampling)
            hidden = self._advance([*timeline, *guesses], 1 + len(guesses))
            chosen = accept(self._model.logits(hidden), guesses, sampling, len(timeline))
            self._speculation.settle(len(chosen) - 1)
        return chosen

    def last_logits(self, ids: Sequence[int]) -> Tensor:
        """Give the logits after the last position of a text, [V] float32.

        Raises:
            ResourceError: The text does not fit into the context.
            ToolkitError: There is no text, or an id is outside the vocabulary.
        """
        timeline = self._checked(ids)
        self._return_to(timeline)
        return self._model.logits(self._advance(timeline))[0]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Give the logits after every position of a text, [T, V] float32, one chunk of rows at a time.

        Raises:
            ResourceError: The text does not fit into the context.
            ToolkitError: There is no text, or an id is outside the vocabulary.
        """
        logits_TV, row = torch.empty(len(ids), self._model.config.vocab_size), 0
        for some in self.logit_blocks(ids):
            logits_TV[row : row + len(some)] = some
            row += len(some)
        return logits_TV

    def logit_blocks(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Give the same a few positions at a time, [some, V] float32: of a long text they are more than fits.

        Raises:
            See `logits`.
        """
        return self._logit_blocks(self._checked(ids))

    def _logit_blocks(self, timeline: list[int]) -> Iterator[Tensor]:
        self._rewind(0)
        for begin in range(0, len(timeline), self._pass_tokens):
            hidden = self._extend(timeline[begin : begin + self._pass_tokens])
            for some in hidden.split(HEAD_TOKENS):
                yield self._model.logits(some)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        timeline, vocab_size = list(ids), self._model.config.vocab_size
        if not timeline:
            raise ToolkitError("there is nothing to continue: the prompt has no tokens")
        for one in timeline:
            if not 0 <= one < vocab_size:
                raise ToolkitError(f"token id {one} is outside the vocabulary of {vocab_size}")
        if len(timeline) > self._cache.ctx:
            raise ResourceError(
                f"the prompt has {len(timeline)} tokens, but the context holds {self._cache.ctx}; shorten it"
                + (" or give a larger --ctx" if self._cache.ctx < self._model.config.max_position_embeddings else "")
            )
        return timeline

    def _return_to(self, timeline: list[int]) -> None:
        """Drop what the cache holds beyond its common beginning with a text."""
        # The last token is always run: its hidden state is not kept.
        self._rewind(min(_common_prefix(self._held, timeline), len(timeline) - 1))

    def _advance(self, timeline: list[int], rows: int = 1) -> Tensor:
        """Bring the cache to the whole timeline and give the hidden states of its last tokens, [rows, D]."""
        hidden = torch.empty(0)
        for begin in range(len(self._held), len(timeline), self._pass_tokens):
            hidden = self._extend(timeline[begin : begin + self._pass_tokens])
        return hidden[-rows:]

    def _extend(self, ids: list[int]) -> Tensor:
        stream = self._model.stream(torch.tensor(ids), self._cache)
        hidden = self._model.norm(stream)
        begin = len(self._held)
        self._held.extend(ids)
        if self._speculation is not None:
            self._speculation.observe(begin, self._held, stream, hidden)
        return hidden

    def _rewind(self, length: int) -> None:
        if self._speculation is not None:
            length = self._speculation.rewind(length)
        # In this order: an interrupt between the two leaves fewer ids than positions, which the next call mends.
        del self._held[length:]
        self._cache.truncate(length)


def _common_prefix(left: list[int], right: list[int]) -> int:
    length = min(len(left), len(right))
    if left[:length] == right[:length]:  # the usual case, at the speed of a comparison
        return length
    return next(index for index in range(length) if left[index] != right[index])
