"""Where the time of a generation went, by operator: the runtime's own record, summed up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from devices.contract import Execution
from runtime_tests.model import OperatorProfile
from runtime_tests.profiling import etdump, onnx
from runtime_tests.profiling.recorded import Recorded


@dataclass(frozen=True)
class Format:
    """A runtime's record.

    Attributes:
        file: its name beside the report, with the ending that the runtime's own tools know.
        read: raises BoaEdgeError for a file that is none.
    """

    file: str
    read: Callable[[Path], Recorded]


FORMATS = {
    "onnx": Format("profile.json", onnx.read),
    "executorch": Format("profile.etdump", etdump.read),
}


def profile_name(runtime: str) -> str:
    """The name of a runtime's record beside the report."""
    return FORMATS[runtime].file


def read_profile(path: Path, runtime: str, execution: Execution) -> OperatorProfile:
    """Sum a record up by operator, the slowest first; what no operator accounts for comes last.

    Raises:
        BoaEdgeError: it cannot be read, or it holds no run of the model.
    """
    recorded = FORMATS[runtime].read(path)
    if recorded.total_ns <= 0:
        raise BoaEdgeError("the runtime's profile holds no run of the model", where=path)
    operators = recorded.operators()
    return OperatorProfile(
        file=path.name,
        execution=execution,
        total_ns=round(recorded.total_ns),
        rest_ns=max(0, round(recorded.total_ns) - sum(entry.ns for entry in operators)),
        operators=operators,
    )
