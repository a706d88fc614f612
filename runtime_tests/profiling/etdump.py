"""ExecuTorch's record: an ETDump."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from runtime_tests.profiling.recorded import Recorded

_WHOLE = "Method::execute"
# Each of these encloses events that are listed themselves.
_ENCLOSING = (_WHOLE, "DELEGATE_CALL", "OPERATOR_CALL")
_RUNS = "Execute"


def read(path: Path) -> Recorded:
    """The time of each call, by kernel, or by XNNPACK's name of it.

    Raises:
        BoaEdgeError: it is no such record.
    """
    calls: dict[tuple[str, bool], list[float]] = defaultdict(list)
    total = 0.0
    for name, delegated, times in _events(path):
        if name == _WHOLE:
            total += sum(times)
        elif name not in _ENCLOSING:
            calls[_plain(name), delegated] += times
    return Recorded(total, calls)


def _events(path: Path) -> list[tuple[str, bool, list[float]]]:
    """Name, whether a delegate ran it, and nanoseconds of each call."""
    try:
        with _silence():
            from executorch.devtools import Inspector
            from executorch.devtools.inspector import TimeScale

            blocks = Inspector(etdump_path=str(path), target_time_scale=TimeScale.NS).event_blocks
    except Exception as error:  # noqa: BLE001 (whatever it makes of a file that is no ETDump)
        raise BoaEdgeError(f"the runtime's profile cannot be read ({error})", where=path) from None
    return [
        (event.name, bool(event.is_delegated_op), [float(value) for value in event.perf_data.raw])
        for block in blocks
        if block.name == _RUNS
        for event in block.events
        if event.perf_data is not None
    ]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The reader imports half of PyTorch's tools, prints, and warns that there are no tensors in the record."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _plain(name: str) -> str:
    """Without the number of the node, and without what the runtime puts before its own operators."""
    return re.sub(r" #\d+$", "", name).removeprefix("native_call_")
