"""The provenance as it stands in a report: every number a figure with its unit. All of it was measured in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime_tests.activations import scheme
from runtime_tests.figure import Figure, figure
from runtime_tests.model import (
    ActivationFacts,
    LayerError,
    LinearCost,
    MethodRow,
    Outlier,
    OutlierFacts,
    Quantization,
    SourceFacts,
    TextFacts,
    TransformFacts,
)
from runtime_tests.provenance import Compared, Layer, OutlierRow, Provenance

_MEGABYTE = 1_000_000


def quantization(provenance: Provenance, recipe: Mapping[str, Any] | None) -> Quantization:
    """How the weights came to be, and what became of the activations."""
    calibration, evaluation = provenance.calibration, provenance.evaluation
    return Quantization(
        method=provenance.method,
        seed=provenance.seed,
        seconds=_known(provenance.seconds, "s"),
        peak_memory=_megabytes(provenance.peak_mb),
        versions=provenance.versions,
        source=SourceFacts(model=provenance.source.model, files=provenance.source.files),
        calibration=TextFacts(**calibration.model_dump()),
        evaluation=TextFacts(
            source=evaluation.source, tokens=evaluation.tokens, sequence_length=evaluation.sequence_length
        ),
        evaluation_overlaps_calibration=evaluation.overlaps_calibration,
        comparison=tuple(_row(row) for row in _with_original(provenance)),
        layers=tuple(_layer(layer) for layer in provenance.layers),
        transforms=_transforms(provenance),
        activations=_activations(provenance, recipe),
        outliers=_outliers(provenance),
    )


def _transforms(provenance: Provenance) -> TransformFacts | None:
    found = provenance.transforms
    return None if found is None else TransformFacts(names=found.names, notes=found.notes)


def _activations(provenance: Provenance, recipe: Mapping[str, Any] | None) -> ActivationFacts | None:
    found = provenance.activations
    if found is None:
        return None
    costs = [LinearCost(name=name, kl=_known(kl, "nats/token")) for name, kl in found.costs.items()]
    return ActivationFacts(
        scheme=scheme(recipe),
        weights_kl=_known(found.weights_kl, "nats/token"),
        all_int8_kl=_known(found.all_int8_kl, "nats/token"),
        kl=_known(found.kl, "nats/token"),
        kept=found.kept,
        costs=tuple(sorted(costs, key=lambda cost: -(found.costs[cost.name] or 0.0))),
    )


def _outliers(provenance: Provenance) -> OutlierFacts | None:
    """None where nobody looked: the quantizer then leaves both lists empty."""
    found = provenance.outliers
    if found is None or not (found.before or found.after):
        return None

    def rows(of: tuple[OutlierRow, ...]) -> tuple[Outlier, ...]:
        return tuple(Outlier(**row.model_dump()) for row in of)

    return OutlierFacts(execution="measured", before=rows(found.before), after=rows(found.after))


def _with_original(provenance: Provenance) -> tuple[Compared, ...]:
    """The rows, the original first: from its own row, or from its perplexity alone."""
    rows, perplexity = provenance.comparison, provenance.evaluation.original_perplexity
    if not rows or perplexity is None or any(row.method == "original" for row in rows):
        return rows
    return (Compared(method="original", perplexity=perplexity, kl=0.0, top1=1.0), *rows)


def _row(row: Compared) -> MethodRow:
    return MethodRow(
        method=row.method,
        recipe=row.recipe,
        perplexity=_known(row.perplexity, "per token"),
        kl=_known(row.kl, "nats/token"),
        top1=_known(row.top1, "fraction"),
        payload_size=_known(row.payload_bytes, "bytes"),
        seconds=_known(row.seconds, "s"),
        peak_memory=_megabytes(row.peak_mb),
    )


def _layer(layer: Layer) -> LayerError:
    return LayerError(
        name=layer.name,
        method=layer.method,
        bits=layer.bits,
        group_size=layer.group_size,
        loss=_known(layer.loss, "squared error"),
        relative_loss=_known(layer.relative_loss, "relative squared error"),
        seconds=_known(layer.seconds, "s"),
    )


def _known(value: float | None, unit: str) -> Figure | None:
    return None if value is None else figure(value, unit, "measured")


def _megabytes(value: float | None) -> Figure | None:
    return None if value is None else figure(round(value * _MEGABYTE), "bytes", "measured")
