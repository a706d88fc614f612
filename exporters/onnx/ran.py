"""Which kernels ONNX Runtime runs for a graph, from its own record of one run on this machine."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from boa_edge.errors import BoaEdgeError
from exporters.onnx.record import BROKEN, node_events, reason

_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")


@dataclass(frozen=True)
class Ran:
    """The optimized graph, as it ran.

    Attributes:
        kernels: operator -> how many nodes of it ran.
        float_products: names of the nodes that multiply float32 matrices.
    """

    kernels: Mapping[str, int]
    float_products: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """`kernels.json` (docs/contracts.md)."""
        return {"schema_version": 1, "kernels": dict(self.kernels), "float_products": list(self.float_products)}


def recorded(
    model: Path,
    options: onnxruntime.SessionOptions,
    run: Callable[[Path, onnxruntime.SessionOptions], onnxruntime.InferenceSession],
) -> Ran:
    """What stands in the record of `run`, which opens `model` with `options` and runs it.

    Raises:
        BoaEdgeError: the record cannot be read.
    """
    with tempfile.TemporaryDirectory() as directory:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(directory) / "record")
        path = Path(run(model, options).end_profiling())
        try:
            nodes = {event.name: event.operator for event in node_events(json.loads(path.read_bytes()))}
        except BROKEN as error:
            problem = f"ONNX Runtime's record of a run cannot be read ({reason(error)})"
            raise BoaEdgeError(problem, where=model) from None
    return Ran(
        dict(sorted(Counter(nodes.values()).items())),
        tuple(sorted(name for name, kind in nodes.items() if kind in _PRODUCTS)),
    )
