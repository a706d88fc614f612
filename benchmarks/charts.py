"""Charts of the benchmarks: drawn without a screen, written as SVG with text that stays text, and as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_DOTS_PER_INCH = 150


def pyplot() -> Any:
    """`matplotlib.pyplot`, loaded only where something is drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "boa-edge"  # the same figure gives the same file
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, output: Path, name: str) -> None:
    """Write `name`.svg and `name`.png into a directory, and be done with the figure."""
    for suffix in ("svg", "png"):
        figure.savefig(
            output / f"{name}.{suffix}", dpi=_DOTS_PER_INCH, metadata={"Date": None} if suffix == "svg" else None
        )
    pyplot().close(figure)
