"""What of a program runs in a delegate and what beside it, as its bundle's `lowering.json` counts it."""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationError

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json
from exporters.bundle import Bundle
from runtime_tests.model import Count, Frozen, Placement

LOWERING = "lowering.json"


class _Document(Frozen):
    schema_version: Literal[1]
    backend: str
    delegates: Count
    delegated: dict[str, Count]
    outside: dict[str, Count]
    quantized_linears: Count
    float_linears: tuple[str, ...]


def read_placement(bundle: Bundle) -> Placement | None:
    """None where the bundle says nothing of it (ONNX). Raises BoaEdgeError, naming the field that is wrong."""
    if LOWERING not in bundle.manifest.files:
        return None
    path = bundle.path / LOWERING
    try:
        found = _Document.model_validate(read_json(path, "what runs where"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BoaEdgeError(f"{field}: {first['msg']}", where=path, fix="Export the checkpoint again") from None
    return Placement(
        backend=found.backend,
        delegates=found.delegates,
        delegated=found.delegated,
        outside=found.outside,
        float_linears=found.float_linears,
    )
