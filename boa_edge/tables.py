"""Tables on stderr."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from boa_edge.visible import visible
from devices.contract import DeviceStatus
from devices.selftest import SelfTest


def print_devices(rows: Iterable[DeviceStatus]) -> None:
    """One line per device: what it is, whether it can be used now, and what is missing."""
    table = Table(box=None, pad_edge=False)
    for title in ("device", "usable", "figures are", "what it is"):
        table.add_column(title, overflow="fold")
    for row in rows:
        usable = "yes" if row.usable else "no: " + "; ".join(row.missing)
        # As texts: rich would read brackets in a string as its own markup.
        table.add_row(*map(_text, (row.name, usable, row.execution or "unknown", row.description)))
    Console(stderr=True).print(table)


def print_self_test(result: SelfTest) -> None:
    """One line per step."""
    title = _text(f"{result.device} ({result.execution or 'not reached'})")
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for name in ("step", "works", "what was seen", "s"):
        table.add_column(name, overflow="fold", justify="right" if name == "s" else "left")
    words = {True: "yes", False: "no", None: "-"}
    for step in result.steps:
        table.add_row(step.name, words[step.works], _text(step.detail), f"{step.seconds:.1f}")
    console = Console(stderr=True)
    console.print(table)
    for note in result.notes:
        console.print(_text(f"note: {note}"))


def _text(words: str) -> Text:
    return Text(visible(words))
