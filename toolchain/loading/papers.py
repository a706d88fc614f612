"""The licence and the model card of a source model: what has to travel with weights that are made from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
CARD = "README.md"
CARD_COPY = "MODEL_CARD.md"
PATTERNS = (*LICENCES, CARD)
_LARGEST = 4 << 20  # bytes; no licence is larger, whatever its name


def find_papers(directory: Path) -> tuple[Path, ...]:
    """The licence files and the model card in a model directory, in order."""
    found = {path for pattern in PATTERNS for path in directory.glob(pattern)}
    return tuple(sorted(path for path in found if path.is_file() and path.stat().st_size <= _LARGEST))


def copy_papers(papers: Iterable[Path], directory: Path) -> None:
    """Copy them; the card is called MODEL_CARD.md from then on, since it describes the source."""
    for path in papers:
        shutil.copyfile(path, directory / (CARD_COPY if path.name == CARD else path.name))
