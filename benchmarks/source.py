"""The original model as other tools read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from boa_edge.files import output_directory
from toolchain.loading import SourceModel


def exported(source: SourceModel, place: Path) -> Path:
    """`place`, a Hugging Face directory of the model in float32, made if it is not there."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with output_directory(place) as partial:
            model: Any = source.model
            model.save_pretrained(partial)
            source.tokenizer.save_pretrained(partial)
    return place
