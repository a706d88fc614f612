"""ONNX Runtime's record of a run: a list of events as browsers' trace viewers (Perfetto) read them, in microseconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_KERNEL = "_kernel_time"

# What an event may raise that is none: as wrong as a file that is not JSON.
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class NodeEvent:
    """One run of one node of the optimized graph.

    Attributes:
        name: the node's.
        operator: its type.
    """

    name: str
    operator: str
    _event: Mapping[str, Any]

    @property
    def nanoseconds(self) -> float:
        """ValueError where the event says no time."""
        return nanoseconds(self._event)


def node_events(events: Iterable[Any]) -> Iterator[NodeEvent]:
    """Those among all events of a record that are a kernel's, in order. Raises one of BROKEN where it is no record."""
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL):
            yield NodeEvent(event["name"].removesuffix(_KERNEL), str(event["args"]["op_name"]), event)


def nanoseconds(event: Mapping[str, Any]) -> float:
    """How long an event took. Raises one of BROKEN where it does not say."""
    value = float(event["dur"]) * 1000
    if not 0 <= value < math.inf:
        raise ValueError(f"a duration of {event['dur']}")
    return value


def reason(error: BaseException) -> str:
    """One of BROKEN in one line."""
    return " ".join(f"{type(error).__name__} {error}".split())[:200]
