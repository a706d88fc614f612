"""Tables on stderr."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from devices.contract import DeviceStatus


def print_devices(rows: Iterable[DeviceStatus]) -> None:
    """One line per device: what it is, whether it can be used now, and what is missing."""
    table = Table(box=None, pad_edge=False)
    for title in ("device", "usable", "figures are", "what it is"):
        table.add_column(title, overflow="fold")
    for row in rows:
        usable = "yes" if row.usable else "no: " + "; ".join(row.missing)
        table.add_row(row.name, usable, row.execution, row.description)
    Console(stderr=True).print(table)
