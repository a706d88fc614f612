"""`report.md`: the main figures as a table, to be put into a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from runtime_tests.labels import label, show, visible
from runtime_tests.model import Report
from runtime_tests.summary import main_figures

# What GitHub and others would take for markup, a link, or a mention of somebody.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~@&]|:(?=//)|(?<=\bwww)\.)", re.IGNORECASE)


def to_markdown(report: Report) -> str:
    """The report in Markdown. Names come from files and are escaped."""
    deployed, device, settings = report.deployed, report.device, report.settings
    threads = f"{settings.threads} thread{'' if settings.threads == 1 else 's'}"
    title = " · ".join(part for part in (deployed.model, deployed.recipe_name, deployed.runtime) if part)
    match = report.generation.against_quantized
    rows = [(name, show(entry), entry.execution if entry else "") for name, entry in main_figures(report)]
    rows.append(("Greedy tokens as the quantized", f"{match.matching}/{match.compared}", device.execution))
    lines = [
        f"### {_plain(title)}",
        "",
        f"On **{_plain(device.name)}** ({device.execution}), {_plain(settings.workload)}, {threads}, {report.created}",
        "",
        *_table(("figure", "value", "how"), rows),
        "",
    ]
    if report.variants:
        execution = device.execution
        names = (
            "bundle",
            "size",
            "KL, nats/token",
            "perplexity",
            label("prefill_speed", execution),
            label("decode_speed", execution),
            label("peak_rss", execution),
        )
        variants = [
            (
                one.name,
                show(one.runtime_size),
                show(one.kl_from_original),
                show(one.perplexity),
                show(one.prefill_speed),
                show(one.decode_speed),
                show(one.peak_rss),
            )
            for one in report.variants
        ]
        lines += [*_table(names, variants), ""]
    lines += [f"- {_plain(note)}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    return [
        *(f"| {' | '.join(line)} |" for line in lines),
        *(f"| {' | '.join(map(_plain, row))} |" for row in rows),
    ]


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\1", " ".join(visible(text).split()))
