"""What of a program runs where: `lowering.json` of ExecuTorch bundles, `kernels.json` of ONNX ones."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import ValidationError

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json
from exporters.bundle import KERNELS, LOWERING, Bundle
from runtime_tests.model import Count, Frozen, Kernels, Placement

_Content = TypeVar("_Content", bound=Frozen)


class _Document(Frozen):
    schema_version: Literal[1]
    backend: str
    delegates: Count
    delegated: dict[str, Count]
    outside: dict[str, Count]
    quantized_linears: Count
    float_linears: tuple[str, ...]


class _Kernels(Kernels):
    schema_version: Literal[1]


def read_placement(bundle: Bundle) -> Placement | None:
    """None where the bundle says nothing of it (ONNX). Raises BoaEdgeError, naming the field that is wrong."""
    if LOWERING not in bundle.manifest.files:
        return None
    found = _read(bundle, LOWERING, _Document)
    return Placement(
        backend=found.backend,
        delegates=found.delegates,
        delegated=found.delegated,
        outside=found.outside,
        float_linears=found.float_linears,
    )


def read_kernels(bundle: Bundle) -> Kernels | None:
    """None where the bundle says nothing of them. Raises BoaEdgeError, naming the field that is wrong."""
    if KERNELS not in bundle.manifest.files:
        return None
    found = _read(bundle, KERNELS, _Kernels)
    return Kernels(kernels=found.kernels, float_products=found.float_products)


def _read(bundle: Bundle, name: str, kind: type[_Content]) -> _Content:
    path = bundle.path / name
    try:
        return kind.model_validate(read_json(path, "what runs where"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BoaEdgeError(f"{field}: {first['msg']}", where=path, fix="Export the checkpoint again") from None
