"""Calibration text: the user's file, a data set by name, or text that the model writes itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boa_edge.errors import UsageError
from boa_edge.files import sha256_file
from boa_edge.progress import say
from toolchain.calibration.kept import kept_text
from toolchain.calibration.named import DATASETS, dataset_sequences
from toolchain.calibration.pool import self_text
from toolchain.loading import SourceModel
from toolchain.recipe import CalibrationSize
from toolchain.text import opening, read_text, sequences, spread, tokenize

__all__ = ["DATASETS", "Calibration", "kept_text", "load_calibration"]

_EVERY = 3  # of so many held-out sequences one is the guard's

# Fields of a recipe's `calibration` that may not be had as asked for, and why.
_LIMITED = {
    "sequence_length": "the longest that the model reads",
    "sequences": "all that the text holds",
    "held_out_sequences": "at most a fifth of the text",
}


@dataclass(frozen=True)
class Calibration:
    """Token sequences to take statistics of, and others to evaluate on.

    Attributes:
        sequences: int64 [n, length].
        held_out: int64 [m, length], sequences that are not among the former unless `overlap`.
        overlap: the text was too short to hold anything out; errors measured on it are optimistic.
        source: where the text came from, JSON-ready.
        weights: float64 [n], mean 1, how much each sequence counts in the statistics; None: all the same.
    """

    sequences: Tensor
    held_out: Tensor
    overlap: bool
    source: dict[str, Any]
    weights: Tensor | None = None

    @property
    def _is_judged(self) -> Tensor:
        return torch.arange(self.held_out.shape[0]) % _EVERY == _EVERY - 1

    @property
    def judged(self) -> Tensor:
        """int64 [m // 3, length], the part of `held_out` that the guard chooses by; all of it where that is none."""
        return self.held_out if self.judges_scored else self.held_out[self._is_judged]

    @property
    def scored(self) -> Tensor:
        """int64 [., length], the other part: nothing was chosen by it."""
        return self.held_out[~self._is_judged]

    @property
    def judges_scored(self) -> bool:
        """Whether there is too little text to keep the guard's apart; figures on it are then a little optimistic."""
        return self.held_out.shape[0] < _EVERY


def load_calibration(
    choice: str | None, source: SourceModel, size: CalibrationSize, seed: int, keep: Path | None = None
) -> Calibration:
    """Calibration text by what the user wrote: a file, a data set's name, or `self` (also when None).

    Where it is less than `size` asks for, a line on stderr says so.

    Args:
        keep: directory in which text that the model writes is kept until the caller removes it, so that an
            interrupted run does not write it again; None keeps nothing.

    Raises:
        UsageError, BoaEdgeError: no such file or name, a text shorter than one sequence, a hub out of reach.
    """
    text = _load(choice, source, size, seed, keep)
    found = {field: (text.source[field], getattr(size, field)) for field in _LIMITED}
    less = [
        f"{field} {used} in place of {asked} ({_LIMITED[field]})"
        for field, (used, asked) in found.items()
        if used != asked
    ]
    if less:
        say(f"calibration: {', '.join(less)}")
    return text


def _load(choice: str | None, source: SourceModel, size: CalibrationSize, seed: int, keep: Path | None) -> Calibration:
    length = min(size.sequence_length, source.spec.max_positions)
    wanted = size.sequences + size.held_out_sequences
    if choice is None or choice == "self":
        text = self_text(source, size, length, seed, keep)
        facts = {"source": "self", "seed": seed, **text.facts}
        return _described(text.sequences, text.held_out, False, facts, text.weights)
    path = Path(choice).expanduser()
    if path.is_file():
        rows = sequences(tokenize(read_text(path), source.tokenizer), length, path, opening(source.tokenizer))
        return _split(spread(rows, wanted), size, {"source": choice, "sha256": sha256_file(path)})
    if choice in DATASETS:
        held = min(size.held_out_sequences, max(wanted // 5, 1))
        tokenizer = source.tokenizer
        rows = dataset_sequences(choice, tokenizer, size.sequences, length, seed, "train")
        held_out = dataset_sequences(choice, tokenizer, held, length, seed, "validation")
        return _described(rows, held_out, False, {"source": choice, "seed": seed})
    accepted = f"Accepted: a text file, self, or one of {', '.join(DATASETS)}"
    raise UsageError(f"no such file or data set: {choice!r}", where="--calibration", fix=accepted)


def _split(rows: Tensor, size: CalibrationSize, source: dict[str, Any]) -> Calibration:
    count = rows.shape[0]
    held_out = min(size.held_out_sequences, max(count // 5, 1))
    overlap = count == 1
    # Every k-th sequence is held out, so that both parts see the whole text.
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.linspace(0, count - 1, held_out + 2)[1:-1].round().to(torch.int64)] = True
    kept = rows if overlap else rows[~chosen][: size.sequences]
    return _described(kept.contiguous(), rows[chosen].contiguous(), overlap, source)


def _described(
    kept: Tensor, held_out: Tensor, overlap: bool, source: dict[str, Any], weights: Tensor | None = None
) -> Calibration:
    counts = {
        "sequences": kept.shape[0],
        "sequence_length": kept.shape[1],
        "tokens": kept.numel(),
        "held_out_sequences": held_out.shape[0],
        "held_out_overlaps": overlap,
    }
    return Calibration(kept, held_out, overlap, {**source, **counts}, weights)
