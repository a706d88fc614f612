"""What a task asks of a model, answered by a bundle's program on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError
from exporters.base import Decoder


class BundleScorer:
    """Scores and continues token sequences.

    Args:
        decoder: the program.
        context: the most tokens that it reads.
    """

    def __init__(self, decoder: Decoder, context: int) -> None:
        self._decoder, self.context = decoder, context
        self._read: tuple[tuple[int, ...], NDArray[np.float32]] | None = None

    def likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log likelihood of `continuation` after `context`, and whether it is what greedy decoding gives.

        Of a context that is too long the beginning is left out.

        Raises:
            ValueError: one of the two is empty.
            BoaEdgeError: the continuation alone is too long.
        """
        if not context or not continuation:
            raise ValueError("a context and a continuation are needed")
        if len(continuation) > self.context:
            fix = "Leave this task out, or export with a longer --context"
            raise BoaEdgeError(f"{len(continuation)} tokens are to be scored; {self.context} are read", fix=fix)
        inputs = (*context, *continuation)[:-1][-self.context :]
        rows = self._logits(inputs)[-len(continuation) :].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        chosen = rows[np.arange(len(continuation)), list(continuation)]
        likelihood = float((chosen - np.log(np.exp(rows).sum(-1))).sum())
        return likelihood, bool((rows.argmax(-1) == np.asarray(continuation)).all())

    def generate(self, prompt: Sequence[int], most: int, ended: Callable[[Sequence[int]], bool]) -> list[int]:
        """Greedy tokens after `prompt`, until `ended` says so of those found, or `most` of them.

        Of a prompt that is too long the beginning is left out. What comes after the end may be among them.

        Raises:
            BoaEdgeError: `most` leaves no room for a prompt.
        """
        if not 0 < most < self.context:
            fix = "Leave this task out, or export with a longer --context"
            raise BoaEdgeError(f"{most} tokens are to be generated; {self.context} are read", fix=fix)
        kept = list(prompt)[-(self.context - most) :]
        # The program starts over with each call: twice as many each time cost twice the last one at most.
        asked = min(16, most)
        while True:
            found = self._decoder.greedy(kept, asked)
            if asked == most or ended(found):
                return found
            asked = min(2 * asked, most)

    def _logits(self, inputs: tuple[int, ...]) -> NDArray[np.float32]:
        """The choices of a question often differ in their last token only, which is not read."""
        if self._read is None or self._read[0] != inputs:
            self._read = inputs, self._decoder.logits(np.asarray([inputs], np.int64))[0]
        return self._read[1]
