"""The result of a command: one compact JSON document, the last line of stdout."""

from __future__ import annotations

import json
from typing import Any

from boa_edge.ranks import is_silent


def finish(document: dict[str, Any]) -> None:
    """Print it; under `torchrun` only the first process does."""
    if not is_silent():
        print(json.dumps(document, separators=(",", ":"), ensure_ascii=False), flush=True)
