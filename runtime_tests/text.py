"""Token ids to text with the bundle's own tokenizer: local files, no remote code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from boa_edge.errors import BoaEdgeError

Decode = Callable[[Sequence[int]], str]


def load_decoder(bundle: Path) -> Decode:
    """A function from ids to text that keeps special tokens visible.

    Raises:
        BoaEdgeError: the bundle's tokenizer is missing or broken.
    """
    path = bundle / "tokenizer.json"
    if path.exists():
        return _fast(path)
    return _slow(bundle)


def _fast(path: Path) -> Decode:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception)
        raise BoaEdgeError(f"is not a tokenizer ({error})", where=path, fix="Export the checkpoint again") from None
    return lambda ids: str(tokenizer.decode([int(token) for token in ids], skip_special_tokens=False))


def _slow(bundle: Path) -> Decode:
    """Tokenizers that come without a `tokenizer.json`, through transformers."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(bundle, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BoaEdgeError(
            f"has no tokenizer that can be read ({reason})", where=bundle, fix="Export the checkpoint again"
        ) from None
    return lambda ids: str(tokenizer.decode([int(token) for token in ids], skip_special_tokens=False))
