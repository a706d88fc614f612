"""ONNX Runtime's record of a run (`exporters.onnx.record`)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from exporters.onnx.record import BROKEN, nanoseconds, node_events, reason
from runtime_tests.profiling.recorded import Recorded

_RUN = ("Session", "model_run")


def read(path: Path) -> Recorded:
    """The time of each kernel, by the operator's name in the graph that ONNX Runtime has made of the bundle's.

    Raises:
        BoaEdgeError: it is no such record.
    """
    calls: dict[tuple[str, bool], list[float]] = defaultdict(list)
    try:
        events = json.loads(path.read_bytes())
        total = sum(nanoseconds(event) for event in events if (event["cat"], event["name"]) == _RUN)
        for node in node_events(events):
            calls[node.operator, False].append(node.nanoseconds)
    except BROKEN as error:
        raise BoaEdgeError(f"the runtime's profile cannot be read ({reason(error)})", where=path) from None
    return Recorded(total, calls)
