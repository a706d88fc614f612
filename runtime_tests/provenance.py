"""Where a bundle came from, told by its `reference/provenance.json`: what is there is checked, the rest is None."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json
from runtime_tests.figure import MOST
from runtime_tests.model import Place


def _drop_overflow(value: Any) -> Any:
    """A perplexity that overflowed, or a loss of nothing over nothing, is no number to show."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
OptionalReal = Annotated[float | None, BeforeValidator(_drop_overflow)]
OptionalNumber = Annotated[Number | None, BeforeValidator(_drop_overflow)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Source(_Part):
    """The unquantized model: its name or path, and the SHA-256 of each of its files."""

    model: str | None = None
    files: dict[str, Sha256] = Field(default_factory=dict)


class Calibration(_Part):
    """The text that the quantizer looked at. `tokens` is in all, `sequence_length` in tokens."""

    source: str | None = None
    sequences: Count | None = None
    sequence_length: Count | None = None
    tokens: Count | None = None
    seed: int | None = None
    sha256: Sha256 | None = None


class Evaluation(_Part):
    """The text on which the comparison was made, and the original's perplexity on it.

    `overlaps_calibration`: the quantizer has seen it, so the errors on it are optimistic.
    """

    source: str | None = None
    tokens: Count | None = None
    sequence_length: Count | None = None
    overlaps_calibration: bool | None = None
    original_perplexity: OptionalNumber = None


class Layer(_Part):
    """One quantized linear layer. `relative_loss` is the error of its output over the output's own square."""

    name: str
    method: str | None = None
    bits: Count | None = None
    group_size: Count | None = None
    loss: OptionalReal = None
    relative_loss: OptionalReal = Field(default=None, validation_alias=AliasChoices("relative_loss", "relative_error"))
    seconds: OptionalNumber = None


class Compared(_Part):
    """One method of quantization, evaluated in PyTorch: KL in nats per token, sizes in bytes, memory in megabytes."""

    method: str
    recipe: str | None = None
    perplexity: OptionalNumber = None
    kl: OptionalNumber = None
    top1: OptionalNumber = None
    payload_bytes: Count | None = None
    seconds: OptionalNumber = None
    peak_mb: OptionalNumber = None


class Transforms(_Part):
    """What was done to the model before it was quantized, by name and in order, and what of it was left out and why."""

    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Activations(_Part):
    """What int8 activations cost, as KL from the original in nats per token on held-out text.

    Attributes:
        weights_kl: of the quantized weights alone; `all_int8_kl` with int8 activations everywhere, `kl` as planned.
        kept: modules whose inputs stay in floating point.
        costs: KL by module of its int8 activations alone, from the quantized weights; empty where nobody had to look.
    """

    weights_kl: OptionalReal = None
    all_int8_kl: OptionalReal = None
    kl: OptionalReal = None
    kept: tuple[str, ...] = ()
    costs: dict[str, OptionalReal] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _kept_were_measured(self) -> Self:
        if unknown := sorted(set(self.kept) - self.costs.keys()):
            raise ValueError(f"kept: {unknown[0]!r} is not among the costs")
        return self


class OutlierRow(_Part):
    """The inputs at one place of a layer; -1 is the head's. A kurtosis of nothing but one value is no number."""

    layer: Annotated[int, Field(ge=-1)]
    place: Place
    maximum: OptionalNumber
    typical: OptionalNumber
    kurtosis: OptionalNumber

    @model_validator(mode="after")
    def _head_is_no_layer(self) -> Self:
        if (self.layer == -1) != (self.place == "head"):
            raise ValueError(f"layer: {self.layer} has no place {self.place!r}, the head alone is -1")
        return self


class Outliers(_Part):
    """What the linears took in, in the original model and after the transforms; empty where nobody looked."""

    before: tuple[OutlierRow, ...] = ()
    after: tuple[OutlierRow, ...] = ()


class Provenance(_Part):
    """`provenance.json`. Every part may be missing."""

    source: Source = Source()
    calibration: Calibration = Calibration()
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    recipe: str | None = None
    method: str | None = None
    layers: tuple[Layer, ...] = ()
    comparison: tuple[Compared, ...] = ()
    evaluation: Evaluation = Evaluation()
    transforms: Transforms | None = None
    activations: Activations | None = None
    outliers: Outliers | None = None
    seconds: OptionalNumber = None
    peak_mb: OptionalNumber = None


def read_provenance(path: Path) -> Provenance:
    """Parse a provenance file; one that does not exist says nothing.

    Raises:
        BoaEdgeError: it is not JSON, or a part that is there is malformed; the error names the field.
    """
    if not path.exists():
        return Provenance()
    document = read_json(path, "the provenance")
    if not isinstance(document, dict):
        raise BoaEdgeError("the provenance is not a JSON object", where=path)
    present = {key: value for key, value in document.items() if value is not None}
    try:
        return Provenance.model_validate(_flatten_comparison(present))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        fix = "Quantize and export the model again"
        raise BoaEdgeError(f"{field}: {first['msg']}", where=path, fix=fix) from None


def _flatten_comparison(document: dict[str, Any]) -> dict[str, Any]:
    """The evaluation may stand beside the comparison, around its rows, or as an item among them."""
    comparison = document.get("comparison")
    if isinstance(comparison, dict):
        comparison = [*(comparison.get("rows") or []), {"evaluation": comparison.get("evaluation")}]
    if not isinstance(comparison, list):
        return document
    rows = []
    evaluation = document.get("evaluation")
    for item in comparison:
        if isinstance(item, dict) and "evaluation" in item and "method" not in item:
            evaluation = evaluation or item["evaluation"]
        else:
            rows.append(item)
    return {**document, "comparison": rows, "evaluation": evaluation or {}}
