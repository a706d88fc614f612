"""The table that a terminal shows when a bundle has been measured."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime_tests.figure import Figure
from runtime_tests.labels import label, show, visible
from runtime_tests.model import Report


def print_summary(report: Report, console: Console | None = None) -> None:
    """Print the main figures to stderr (or to `console`), each with how it was come by."""
    console = console or Console(stderr=True)
    console.print(summary_table(report))


def summary_table(report: Report) -> Table:
    """The main figures: what, value, how, n."""
    deployed, execution = report.deployed, report.device.execution
    match = report.generation.against_quantized
    title = f"{deployed.model or 'model'} · {deployed.recipe_name or 'recipe not recorded'} · {report.device.name}"
    table = Table(title=Text(visible(title)), box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("how")
    table.add_column("n", justify="right")
    for name, entry in main_figures(report):
        count = "" if entry is None or entry.n is None else str(entry.n)
        table.add_row(name, show(entry), entry.execution if entry else "", count)
    table.add_row("Greedy tokens as the quantized", f"{match.matching}/{match.compared}", execution, "")
    if execution == "emulated":
        table.caption = Text("emulated time says nothing about the speed of a phone")
    return table


def main_figures(report: Report) -> list[tuple[str, Figure | None]]:
    """What a reader wants to know first, in words, in order."""
    deployed, scores, execution = report.deployed, report.fidelity.deployed, report.device.execution
    return [
        ("Size on the device", deployed.runtime_size),
        ("Perplexity, original", report.fidelity.original.perplexity),
        ("Perplexity, quantized in PyTorch", report.fidelity.quantized.perplexity),
        ("Perplexity, deployed", scores.perplexity),
        ("KL from the original", scores.kl_from_original),
        ("KL from the quantized in PyTorch", scores.kl_from_quantized),
        ("Top token as the original", scores.top1_with_original),
        ("Top token as the quantized in PyTorch", scores.top1_with_quantized),
        ("Largest logit difference from it", scores.max_logit_error_from_quantized),
        *((label(name, execution), getattr(report.speed, name)) for name in type(report.speed).model_fields),
        (label("peak_rss", execution), report.memory.peak_rss),
        *((("Instructions per token", report.cost.instructions_per_token),) if report.cost else ()),
        *((("Energy per token", report.energy.per_token),) if report.energy and report.energy.per_token else ()),
    ]
