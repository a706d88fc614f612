"""A bundle as a model of lm-eval (EleutherAI's lm-evaluation-harness). Importing this needs the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import track
from runtime_tests.tasks.scorer import BundleScorer

_MOST_NEW = 256  # where a task does not say how many, as lm-eval's own models


class BundleModel(TemplateLM):
    """Answers lm-eval's three kinds of request with the deployed program, not with PyTorch.

    Args:
        scorer: the program.
        tokenizer: of `transformers`; special tokens are added as it adds them by itself.
        ends: ids that end a text.
        start: id that an empty context stands for; the first of `ends` where there is none.
    """

    def __init__(self, scorer: BundleScorer, tokenizer: Any, ends: Sequence[int], start: int | None) -> None:
        super().__init__()
        if not ends and start is None:
            raise BoaEdgeError("the bundle names no token that ends a text", where="runtime.json: eos_token_ids")
        self._scorer, self.tokenizer, self._ends = scorer, tokenizer, tuple(ends)
        self._start = self._ends[0] if start is None else start

    @property
    def eot_token_id(self) -> int:
        return self._ends[0] if self._ends else self._start

    @property
    def prefix_token_id(self) -> int:
        return self._start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begun = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        special = not begun if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return [self._scorer.likelihood(context, end) for _, context, end in track(requests, "scoring")]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return [self._rolling(request.args[0]) for request in track(requests, "scoring texts")]

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            self.tok_encode(text, add_special_tokens=False), self._start, self._scorer.context, 1
        )
        return sum(self._scorer.likelihood(*make_disjoint_window(window))[0] for window in windows)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._until(*request.args) for request in track(requests, "generating")]

    def _until(self, context: str, wishes: dict[str, Any]) -> str:
        if wishes.get("do_sample") and wishes.get("temperature", 1.0) != 0:
            fix = "Choose tasks that decode greedily"
            raise BoaEdgeError("the task wants sampled text, and a bundle is scored by its greedy text", fix=fix)
        stops = wishes.get("until") or []
        stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
        most = wishes.get("max_gen_toks")
        found = self._scorer.generate(
            self.tok_encode(context),
            _MOST_NEW if most is None else int(most),
            lambda tokens: self._cut(tokens, stops)[1],
        )
        return self._cut(found, stops)[0]

    def _cut(self, tokens: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
        """The text up to its end, and whether an end has come."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
        text: str = self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True)
        places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        return (text[: min(places)], True) if places else (text, end is not None)
