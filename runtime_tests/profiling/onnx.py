"""ONNX Runtime's record: a list of events as browsers' trace viewers (Perfetto) read them, times in microseconds."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError
from runtime_tests.profiling.recorded import Recorded

_RUN = ("Session", "model_run")
_KERNEL = "_kernel_time"


def read(path: Path) -> Recorded:
    """The time of each kernel, by the operator's name in the graph that ONNX Runtime has made of the bundle's.

    Raises:
        BoaEdgeError: it is no such record.
    """
    calls: dict[tuple[str, bool], list[float]] = defaultdict(list)
    total = 0.0
    try:
        for event in json.loads(path.read_bytes()):
            if (event["cat"], event["name"]) == _RUN:
                total += _nanoseconds(event)
            elif event["cat"] == "Node" and event["name"].endswith(_KERNEL):
                calls[str(event["args"]["op_name"]), False].append(_nanoseconds(event))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise BoaEdgeError(f"the runtime's profile cannot be read ({reason})", where=path) from None
    return Recorded(total, calls)


def _nanoseconds(event: Any) -> float:
    value = float(event["dur"]) * 1000
    if not 0 <= value < math.inf:
        raise ValueError(f"a duration of {event['dur']}")
    return value
