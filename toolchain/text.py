"""Text in, token sequences out: what both calibration and evaluation read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boa_edge.errors import BoaEdgeError

# Placeholder that tokenised corpora print for rare words; as text it would be a token that no user ever types.
_UNKNOWN_MARKER = "<unk>"
_PROBE = "text"


def read_text(path: Path) -> str:
    """A UTF-8 text file, without unknown-word markers.

    Raises:
        BoaEdgeError: missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise BoaEdgeError("no such text file", where=path) from None
    except UnicodeDecodeError as error:
        raise BoaEdgeError(f"is not UTF-8 text (byte {error.start})", where=path, fix="Save it as UTF-8") from None
    text = text.replace(f" {_UNKNOWN_MARKER}", "").replace(_UNKNOWN_MARKER, "")
    if not text.strip():
        raise BoaEdgeError("the text file is empty", where=path)
    return text


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids of a text, int64 [tokens], without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def opening(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before every text it is given (Gemma, Llama 3: the token that begins one), or nothing.

    A model that was trained behind it, and meets it on every device, is lost without: Gemma's perplexity grows tenfold.
    """
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    starts = (start for start in range(len(whole) - len(plain) + 1) if whole[start : start + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])


def spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows [n, ...], evenly spread, so that a long text is seen from end to end."""
    if rows.shape[0] <= count:
        return rows
    return rows[torch.linspace(0, rows.shape[0] - 1, count).round().to(torch.int64)]


def sequences(tokens: Tensor, length: int, where: object, first: tuple[int, ...] = ()) -> Tensor:
    """Consecutive sequences without overlap, int64 [n, length]; the rest is dropped.

    Args:
        first: tokens that every sequence begins with, of its length.

    Raises:
        BoaEdgeError: fewer tokens than one sequence.
    """
    own = length - len(first)
    count = tokens.numel() // own if own > 0 else 0
    if count == 0:
        fix = f"Give at least {length} tokens of text, or a shorter sequence length"
        raise BoaEdgeError(f"{tokens.numel()} tokens are less than one sequence of {length}", where=where, fix=fix)
    return behind(first, tokens[: count * own].view(count, own))


def behind(first: tuple[int, ...], rows: Tensor) -> Tensor:
    """Rows [n, length] with tokens before each, [n, len(first) + length]."""
    return torch.cat([torch.tensor(first, dtype=rows.dtype).expand(rows.shape[0], -1), rows], 1) if first else rows
