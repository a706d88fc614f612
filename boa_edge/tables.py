"""Tables on stderr."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from devices.contract import DeviceStatus
from devices.selftest import SelfTest


def print_devices(rows: Iterable[DeviceStatus]) -> None:
    """One line per device: what it is, whether it can be used now, and what is missing."""
    table = Table(box=None, pad_edge=False)
    for title in ("device", "usable", "figures are", "what it is"):
        table.add_column(title, overflow="fold")
    for row in rows:
        usable = "yes" if row.usable else "no: " + "; ".join(row.missing)
        table.add_row(row.name, usable, row.execution, row.description)
    Console(stderr=True).print(table)


def print_self_test(result: SelfTest) -> None:
    """One line per step."""
    table = Table(box=None, pad_edge=False, title=f"{result.device} ({result.execution})", title_justify="left")
    for title in ("step", "works", "what was seen", "s"):
        table.add_column(title, overflow="fold", justify="right" if title == "s" else "left")
    words = {True: "yes", False: "no", None: "-"}
    for step in result.steps:
        table.add_row(step.name, words[step.works], Text(step.detail), f"{step.seconds:.1f}")
    console = Console(stderr=True)
    console.print(table)
    for note in result.notes:
        console.print(Text(f"note: {note}"))
