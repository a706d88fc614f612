"""How fast devices that are not attached might decode: memory bandwidth over bytes read per token.

While it generates, a model of this size waits for memory: each token reads every weight once. What share of a
device's peak bandwidth that reaches was taken from published figures (`phones.toml`). Prefill is bound by arithmetic,
so there is no such estimate for it.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from runtime_tests.figure import Figure
from runtime_tests.model import Deployed, Estimate

_TABLE = Path(__file__).with_name("phones.toml")
_SCALE_BYTES = 4  # of an embedding table's scales, as both exporters store them


def estimates(deployed: Deployed, config: dict[str, Any]) -> tuple[Estimate, ...]:
    """One for each device of the table.

    Args:
        config: the bundle's config.json.
    """
    table = _read_table()
    read = bytes_per_token(deployed, config)
    if read is None:
        return ()
    efficiency = table["efficiency"]
    found = []
    for device in table["devices"]:
        peak = device["peak_gb_s"]
        low, middle, high = (efficiency[name] * peak * 1e9 / read for name in ("low", "middle", "high"))
        found.append(
            Estimate(
                device=device["name"],
                chip=device["chip"],
                peak_bandwidth=Figure(value=peak, unit="GB/s", execution="estimated", note=device["source"]),
                bytes_per_token=Figure(value=read, unit="bytes", execution="estimated"),
                decode_speed=_speed(middle),
                decode_speed_low=_speed(low),
                decode_speed_high=_speed(high),
                basis=table["basis"],
            )
        )
    return tuple(found)


def bytes_per_token(deployed: Deployed, config: dict[str, Any]) -> int | None:
    """Bytes of weights that one generated token reads; None where config.json does not say what the table is.

    All of the model's files but a table that is only looked up, since it is not the head's. The keys and values of the
    text so far come on top; at a few hundred tokens they are little beside that.
    """
    size = deployed.model_size.number
    vocabulary, width = config.get("vocab_size"), config.get("hidden_size")
    if size is None or not isinstance(vocabulary, int) or not isinstance(width, int):
        return None
    looked_up = config.get("tie_word_embeddings") is False
    return round(size - (_table_bytes(deployed.recipe or {}, vocabulary, width) if looked_up else 0))


def _table_bytes(recipe: dict[str, Any], vocabulary: int, width: int) -> float:
    table = recipe.get("embedding")
    if not isinstance(table, dict):
        return vocabulary * width * 4
    groups = width / (table.get("group_size") or width)
    return vocabulary * (width * int(table.get("bits", 8)) / 8 + groups * _SCALE_BYTES)


def _speed(value: float) -> Figure:
    return Figure(value=value, unit="tokens/s", execution="estimated")


@cache
def _read_table() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))
