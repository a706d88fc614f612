"""The page: the template with the report, its charts and the filters that the template uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from runtime_tests.figure import Figure
from runtime_tests.labels import SCHEMES, label, method_name, number, show, show_bytes, show_value, visible
from runtime_tests.model import Continuation, Memory, Report, Speed
from runtime_tests.report.charts import kl_against_speed, layer_strip, size_against_kl, token_times
from runtime_tests.report.layers import grid
from runtime_tests.report.outliers import changed, outlier_chart, worst

_DIRECTORY = Path(__file__).parent
_ZONES = "temperatures_c."


def render(report: Report) -> str:
    """The report as one HTML document: no script, no request to anywhere.

    Everything in it is escaped, and characters that could hide or reorder text are spelled out: names come from
    files, and texts from a model.
    """
    environment = Environment(
        loader=FileSystemLoader(_DIRECTORY),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        show=show,
        show_value=show_value,
        bytes=show_bytes,
        number=number,
        method=method_name,
        flat=flatten,
        breakable=breakable,
    )
    environment.globals["label"] = partial(label, execution=report.device.execution)
    outliers = report.quantization.outliers
    state = before_and_after(report.device.state or {})
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup((_DIRECTORY / "report.css").read_text(encoding="utf-8")),
        charts={
            "variants": kl_against_speed(report.variants, report.device.execution),
            "methods": size_against_kl(report.quantization.comparison),
            "layers": layer_strip(report.quantization.layers),
            "tokens": token_times(report),
            "maximum": outlier_chart(outliers, "maximum"),
            "kurtosis": outlier_chart(outliers, "kurtosis"),
        },
        cells=grid(report.quantization.layers),
        worst=[] if outliers is None else worst(outliers),
        compared=outliers is not None and changed(outliers),
        schemes=SCHEMES,
        figures=[*_figures(report.speed), *_figures(report.memory)],
        recipe=_yaml(report.deployed.recipe),
        split=partial(split_text, report),
        state=[row for row in state if not row[0].startswith(_ZONES)],
        zones=[(name.removeprefix(_ZONES), *row) for name, *row in state if name.startswith(_ZONES)],
    )


def _figures(group: Speed | Memory) -> list[tuple[str, Figure]]:
    """Name and figure of all that were recorded."""
    found = [(name, getattr(group, name)) for name in type(group).model_fields]
    return [(name, entry) for name, entry in found if entry is not None]


def split_text(report: Report, continuation: Continuation) -> tuple[str, str]:
    """A continuation's text up to where it leaves the quantized model's, and from there on.

    Decoding is not always additive over tokens, so the border is the last space that both texts have in common.
    """
    text, other = continuation.text or "", report.generation.quantized.text or ""
    length = min(len(continuation.tokens), len(report.generation.quantized.tokens))
    if continuation.tokens[:length] == report.generation.quantized.tokens[:length]:
        return text, ""
    common = next((place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))
    while common and not text[common - 1 : common].isspace():
        common -= 1
    return text[:common], text[common:]


def breakable(name: str) -> Markup:
    """A long name that may be broken after a slash, a dot, a hyphen or an underscore, and before a capital inside."""
    return Markup(re.sub(r"([/._-]|(?<=[a-z])(?=[A-Z]))", r"\1<wbr>", str(escape(visible(name)))))


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (dotted name, text) rows; what cores have each, in one row."""
    if isinstance(value, Mapping) and value and all(re.fullmatch(r"cpu\d+", str(key)) for key in value):
        yield prefix, _by_core(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{prefix}[{index}]")
    elif isinstance(value, list | tuple):
        yield prefix, " ".join(map(str, value)) or "none"
    elif value is None:
        yield prefix, "unavailable"
    elif isinstance(value, bool):
        yield prefix, "yes" if value else "no"
    elif prefix.endswith("_bytes") and isinstance(value, int):
        yield prefix.removesuffix("_bytes"), show_bytes(value)
    else:
        yield prefix, str(value)


def _by_core(values: Mapping[str, Any]) -> str:
    """`schedutil`, or `cpu0-3: schedutil, cpu4-7: performance`."""
    cores = sorted((int(str(name)[3:]), str(value)) for name, value in values.items())
    runs = [(list(run), value) for value, run in groupby(cores, key=lambda core: core[1])]
    if len(runs) == 1:
        return f"{runs[0][1]} ({'all ' if len(cores) > 1 else ''}{len(cores)})"
    named = [(run[0][0], run[-1][0], value) for run, value in runs]
    return ", ".join(f"cpu{first}{f'-{last}' if last > first else ''}: {value}" for first, last, value in named)


def before_and_after(state: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """What a device said at both times, as (dotted name, before, after) rows."""
    first, last = (dict(flatten(state.get(when, {}))) for when in ("before", "after"))
    return [(name, first.get(name, "unavailable"), last.get(name, "unavailable")) for name in {**first, **last}]


def _yaml(document: Mapping[str, Any] | None) -> str | None:
    if document is None:
        return None
    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True).rstrip()


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
