"""What a recipe says, as frozen, validated data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from toolchain.activations.cache import CacheScheme
from toolchain.grids import GridFormat, ScaleSearch
from toolchain.methods import METHODS
from toolchain.options import Options
from toolchain.transforms.named import LEARNED_ROTATION, NAMES

# What stands behind `a8` and `kv8` in a name.
ACTIVATION_LETTERS = {"per_block": "", "per_token": "t", "per_row": "r", "static_int8": "s", "static_uint8": "u"}
CACHE_LETTERS = {"per_head": "", "per_token": "t"}
_SMALLEST_GROUP, _LARGEST_GROUP = 16, 256
_MOST = 1 << 20  # sequences, and tokens of one
_LARGEST_SEED = (1 << 63) - 1  # of PyTorch's generators


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class WeightFormat(_Frozen):
    """How a matrix is stored: bits, inputs per scale (null: one scale per output channel), symmetric or not.

    Attributes:
        bits: `auto` chooses them for each projection, so that the payload of the whole checkpoint (codes, scales, zero
            points, embedding table, norms) is no more than `budget_mb` megabytes of 10^6 bytes.
    """

    bits: Literal[2, 3, 4, 8, "auto"]
    budget_mb: float | None = Field(default=None, gt=0)
    group_size: int | None = Field(default=None, ge=_SMALLEST_GROUP, le=_LARGEST_GROUP)
    symmetric: bool = True

    @model_validator(mode="after")
    def _budget_is_for_auto(self) -> WeightFormat:
        if self.bits == "auto" and self.budget_mb is None:
            raise ValueError("bits 'auto' need a budget_mb, the size of the checkpoint in megabytes")
        if self.bits != "auto" and self.budget_mb is not None:
            raise ValueError(f"budget_mb is for bits 'auto', not for {self.bits} bits")
        return self


class EmbeddingFormat(_Frozen):
    """The embedding table and the output head; symmetric (`toolchain.tables`).

    Attributes:
        group_size: null gives each token one scale, which is all that ExecuTorch's head holds at 8 bits.
    """

    bits: Literal[4, 8] = 8
    group_size: int | None = Field(default=None, ge=_SMALLEST_GROUP, le=_LARGEST_GROUP)


class ActivationChoice(_Frozen):
    """How the inputs of the quantized linears are quantized.

    Attributes:
        scheme: as the runtime does it (`toolchain.activations`). `per_block`: ONNX Runtime's int4 kernel; `per_token`:
            ExecuTorch on XNNPACK; `static_int8`, `static_uint8`: graphs for NPUs.
        budget: by how much int8 activations may raise the KL, relative to that of the weights alone; where it would be
            more, the linears that cost most keep floating-point activations. Null: whatever it costs.
    """

    scheme: Literal["per_block", "per_token", "per_row", "static_int8", "static_uint8"] = "per_block"
    bits: Literal[8] = 8
    budget: float | None = Field(default=0.1, ge=0)


class CacheChoice(_Frozen):
    """How keys and values are kept between tokens (`toolchain.activations.cache`).

    Attributes:
        scheme: `per_head`: one scale per key-value head, by calibration; `per_token`: one per token and head, which no
            runtime keeps.
    """

    scheme: CacheScheme = "per_head"
    bits: Literal[8] = 8


class LearningChoice(_Frozen):
    """How the transform `learnedrotation` learns (`toolchain.rotation_learning`).

    Attributes:
        steps: of gradient descent, each on 128 tokens.
        angle: by which the first step turns, in radians; later ones less.
        head: `tied`: two products with the rotation at run time; `untied`: none, and the head stored by itself.
        largest_model: in parameters; a larger model is refused.
    """

    steps: int = Field(default=64, ge=1, le=10000)
    angle: float = Field(default=0.05, gt=0, le=1)
    head: Literal["tied", "untied"] = "tied"
    largest_model: int = Field(default=400_000_000, ge=1)


class CalibrationSize(_Frozen):
    """How much text the statistics see, and how much is held out.

    Attributes:
        held_out_sequences: a third for the guard to choose by, the rest to evaluate on.
        pool: candidates written per sequence used, of text that the model writes itself (`--calibration self`). Those
            that match the pool's statistics best are chosen and weighted; 1 takes them as they come, which measured
            better on real text (docs/benchmarks/zero_shot.md).
    """

    sequences: int = Field(default=64, ge=1, le=_MOST)
    sequence_length: int = Field(default=512, ge=8, le=_MOST)
    held_out_sequences: int = Field(default=12, ge=1, le=_MOST)
    pool: float = Field(default=1.0, ge=1, le=16)


class Recipe(_Frozen):
    """One quantization, spelled out.

    Attributes:
        method: a line of `toolchain.methods.METHODS`.
        weights: format of the linears of every block.
        embedding: format of the embedding table and head; null keeps them in floating point.
        scale_search: how grids are chosen; null takes the method's own (minmax for rtn, hessian for the others).
        solver: what differs from the method's own options; null: nothing.
        round_scales: round scales to bfloat16 before the codes are solved, so that every runtime holds them exactly.
        damping: added to the diagonal of each Hessian, relative to its mean.
        activations: null leaves them in floating point.
        kv_cache: null keeps keys and values in floating point.
        transforms: by name (`toolchain.transforms.named`), in this order, before anything is quantized.
        learning: of the transform `learnedrotation`.
        seed: of text that the model writes itself, and of rotations.
    """

    method: str
    weights: WeightFormat
    embedding: EmbeddingFormat | None = EmbeddingFormat()
    scale_search: ScaleSearch | None = None
    round_scales: bool = True
    damping: float = Field(default=0.01, gt=0, le=1)
    solver: Options | None = None
    activations: ActivationChoice | None = None
    kv_cache: CacheChoice | None = None
    transforms: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    learning: LearningChoice = LearningChoice()
    calibration: CalibrationSize = CalibrationSize()
    seed: int = Field(default=0, ge=0, le=_LARGEST_SEED)

    @model_validator(mode="before")
    @classmethod
    def _solver_over_the_methods_own(cls, document: Any) -> Any:
        """What `solver` leaves out is what the method has there."""
        if isinstance(document, dict) and isinstance(solver := document.get("solver"), dict):
            method = METHODS.get(str(document.get("method")))
            if method is not None and method.options is not None:
                return {**document, "solver": method.options.model_dump() | solver}
        return document

    @model_validator(mode="after")
    def _known_method(self) -> Recipe:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown; accepted: {', '.join(METHODS)}")
        if self.solver is not None and METHODS[self.method].options is None:
            raise ValueError(f"solver: method {self.method!r} solves nothing; leave it out, or choose another method")
        for name in self.transforms:
            if name not in NAMES:
                raise ValueError(f"transform {name!r} is unknown; accepted: {', '.join(NAMES)}")
        if len(set(self.transforms)) != len(self.transforms):
            raise ValueError(f"transforms {', '.join(self.transforms)}: one comes twice")
        if LEARNED_ROTATION in self.transforms and self.activations is None:
            raise ValueError(f"transform {LEARNED_ROTATION!r} learns what suits int8 activations: set activations")
        if self.search in ("hessian", "compensated") and not METHODS[self.method].options:
            raise ValueError(f"scale_search {self.search!r} needs statistics, and method {self.method!r} collects none")
        return self

    @property
    def search(self) -> ScaleSearch:
        """The grid search in force."""
        return self.scale_search or METHODS[self.method].default_search

    @property
    def options(self) -> Options | None:
        """The solver options in force; None for a method that needs no statistics."""
        return self.solver or METHODS[self.method].options

    @property
    def unties_head(self) -> bool:
        """Whether a transform gives the head a table of its own, if it has none yet."""
        learned = LEARNED_ROTATION in self.transforms and self.learning.head == "untied"
        return "rotateuntied" in self.transforms or learned

    @property
    def grid_format(self) -> GridFormat:
        """The grids' format; where each projection has bits of its own, those stand for the ones given here."""
        weights = self.weights
        bits = 4 if weights.bits == "auto" else weights.bits
        return GridFormat(bits, weights.group_size, weights.symmetric, self.round_scales)

    @property
    def scale_bits(self) -> int:
        """Bits of a stored scale."""
        return 16 if self.round_scales else 32

    @property
    def name(self) -> str:
        """The name by which the weights' format and method are known."""
        group = f"g{self.weights.group_size}" if self.weights.group_size else ""
        asym = "" if self.weights.symmetric else "asym"
        budget = self.weights.budget_mb
        bits = self.weights.bits if budget is None else f"mix{budget:.10g}mb"
        a8 = "" if self.activations is None else f"a8{ACTIVATION_LETTERS[self.activations.scheme]}"
        kv8 = "" if self.kv_cache is None else f"kv8{CACHE_LETTERS[self.kv_cache.scheme]}"
        return "-".join([f"w{bits}{group}{asym}{a8}{kv8}", self.solved_by, *self.transforms])

    @property
    def solved_by(self) -> str:
        """The method, and where the solver is not as the method has it, a mark that says so."""
        return self.method if self.solver is None else f"{self.method}+solver"

    def with_method(self, method: str) -> Recipe:
        """The same formats by another method, with its own options and, where none was chosen, its own grid search."""
        return self.model_validate({**self.model_dump(), "method": method, "solver": None})

    def effective(self) -> dict[str, Any]:
        """Its fields, JSON-ready, with what is in force in the place of what was left to the method."""
        options = None if self.options is None else self.options.model_dump()
        return self.model_dump(mode="json") | {"scale_search": self.search, "solver": options}

    def to_yaml(self) -> str:
        """What is in force, less what it does not use; `parse_recipe` reads it back as this recipe."""
        document = self.effective()
        if LEARNED_ROTATION not in self.transforms:
            del document["learning"]
        return yaml.safe_dump(document, sort_keys=False)
