"""What one written sequence is made of: where texts start, how hot they are sampled, what a chat template inserts.

Three schedules take turns, so that openings differ in different ways:

    hot     the temperature falls from 2 to 1 over the first 16 tokens (self-calibration, arXiv 2410.17170)
    greedy  a first token drawn from the model's unigram prior, 3 to 5 tokens greedily, the rest at 1 (LLM-QAT's scheme,
            arXiv 2305.17888)
    plain   temperature 1 throughout

Where there is a chat template, every other sequence is a conversation: the model writes both sides.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from toolchain.calibration.chat import ChatFrame
from toolchain.loading import SourceModel

Schedule = Literal["hot", "greedy", "plain"]

SCHEDULES: tuple[Schedule, ...] = ("hot", "greedy", "plain")
_SEPARATOR = "<|endoftext|>"
_HOTTEST = 2.0
_WARM_TOKENS = 16
_USER_SHARE, _LONGEST_USER_TURN = 4, 96  # a user's turn takes at most this part of a sequence, and so many tokens


@dataclass(frozen=True)
class Conventions:
    """How a model's texts begin and end.

    Attributes:
        start: the token before every text; None: texts start with a token drawn from the prior.
        ends: tokens that end a text or a turn.
        prior: cumulative unigram probabilities, float64 [vocabulary].
        frame: of the chat template; None without one.
    """

    start: int | None
    ends: frozenset[int]
    prior: NDArray[np.float64]
    frame: ChatFrame | None

    def identity(self) -> dict[str, Any]:
        """What tells them from others, JSON-ready."""
        prior = hashlib.sha256(self.prior.tobytes()).hexdigest()
        frame = None if self.frame is None else asdict(self.frame)
        return {"start": self.start, "ends": sorted(self.ends), "prior": prior, "frame": frame}


def end_tokens(source: SourceModel) -> frozenset[int]:
    """Ids that end a text, by the tokenizer and by the generation settings."""
    ends: set[int] = set()
    for found in (source.generation_config.get("eos_token_id"), source.tokenizer.eos_token_id):
        ends.update(int(end) for end in (found if isinstance(found, list) else [found]) if end is not None)
    return frozenset(ends)


def start_token(tokenizer: Any, frame: ChatFrame | None) -> int | None:
    """The token before every text, or None.

    The beginning-of-sequence token, unless there is none or it is what opens a turn of a conversation; then the token
    that GPT-2 and its many heirs put between documents, if the tokenizer knows it.
    """
    token = tokenizer.bos_token_id
    if token is not None and (frame is None or token not in frame.answer):
        return int(token)
    separator = tokenizer.get_added_vocab().get(_SEPARATOR)
    return None if separator is None else int(separator)


class Script:
    """One sequence's state: ask for a temperature, offer the token that was drawn, take the token that is written.

    Args:
        index: of the sequence; with the seed it decides the kind, the schedule and all of its random numbers.
        length: of the sequence in tokens.
    """

    def __init__(
        self, conventions: Conventions, seed: int, index: int, length: int, schedules: Sequence[Schedule] = SCHEDULES
    ) -> None:
        self._conventions = conventions
        self._random = np.random.default_rng([seed, index])
        self.chat = conventions.frame is not None and index % 2 == 1
        kind = index // 2 if conventions.frame is not None else index
        self.schedule: Schedule = schedules[kind % len(schedules)]
        self._greedy = 3 + kind // len(schedules) % 3
        self._longest_turn = min(length // _USER_SHARE, _LONGEST_USER_TURN)
        self._forced: deque[int] = deque()
        self._turn: Literal["text", "user", "answer"] = "text"
        self._age = 0  # tokens that the model wrote since the text or turn began
        self._open()

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return float(self._random.random())

    def temperature(self) -> float:
        """At which the next token is to be drawn; 0 means the most likely one."""
        if self._forced or self._turn == "answer":
            return 1.0
        if self.schedule == "hot":
            return 1 + (_HOTTEST - 1) * max(0.0, 1 - self._age / _WARM_TOKENS)
        if self.schedule == "greedy" and self._age < self._greedy:
            return 0.0
        return 1.0

    def take(self, drawn: int) -> tuple[int, bool]:
        """The next token, and whether the model chose it: `drawn`, or what the start or the template prescribes."""
        if self._forced:
            return self._forced.popleft(), False
        self._age += 1
        ended = drawn in self._conventions.ends
        if self._turn == "user" and self._age >= self._longest_turn:
            ended = True
        if not ended:
            return drawn, True
        # What starts the next text, or what the template puts after a turn, takes the place of the end.
        frame = self._conventions.frame
        if self._turn == "text" or frame is None:
            self._open()
        elif self._turn == "user":
            self._begin("answer", frame.answer)
        else:
            self._begin("user", frame.follow_up)
        return self._forced.popleft(), False

    def first(self) -> int:
        """The token at position 0."""
        return self._forced.popleft()

    def _open(self) -> None:
        """Start a text, or a conversation."""
        frame, start = self._conventions.frame, self._conventions.start
        if self.chat and frame is not None:
            self._begin("user", frame.opening)
        else:
            self._begin("text", () if start is None else (start,))
        if not self._forced:
            self._forced.append(self._draw())

    def _begin(self, turn: Literal["text", "user", "answer"], prefix: tuple[int, ...]) -> None:
        self._turn, self._age = turn, 0
        self._forced.extend(prefix)
        if turn != "answer" and self.schedule == "greedy":
            self._forced.append(self._draw())

    def _draw(self) -> int:
        return int(np.searchsorted(self._conventions.prior, self.uniform(), side="right"))
