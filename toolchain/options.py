"""What a solver can be told, as frozen, validated data: the `solver` part of a recipe, over the method's own."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_TWO_SIDED = "attention_rows 'boa' and 'gauss_newton'"


class Options(BaseModel):
    """Options of a calibrated method. Each method has its own values for them (`toolchain.methods`).

    Attributes:
        attention_rows: row Hessians of q, k and v. `none`: none, as in GPTQ. `boa`: those of BoA's Table 1
            (arXiv 2406.13474). `gauss_newton`: for q and k those that see the softmax. `aespa`: BoA's of q and k, for v
            the identity; in the loss that is learned on, while the solver before it is GPTQ (arXiv 2402.08958).
        adaptive_rows: the grids of so many rows of a head are found together, once the rows before them are solved,
            from the weights as these have left them; null finds all grids beforehand. Not with activation_order.
        activation_order: columns and rows are solved by falling diagonal of their Hessian; groups and storage stay.
        recollect: statistics are taken again inside a block after each group of projections (q k, v, o, gate up, down),
            on the quantized weights before it; otherwise once per block, at full precision.
        deviation: how much of the deviation of a projection's inputs, which the layers quantized before it have caused,
            its weights make up for: 0 nothing (GPTQ, BoA), 1 all that least squares can.
        residual: of the deviation of the residual stream `o` and `down` make up for so much as well, times `deviation`;
            needs recollect. Nothing in a family that norms what they put out (Gemma).
        attention_sequences: of so many calibration sequences attention's statistics are taken; null: of all.
        compared_sequences: so many run through the full-precision model too, to see the deviations; null: all. Column
            Hessians are taken of every sequence.
        safety_net: as much text as a sixteenth of what attention's statistics are taken of is kept from those of q, k
            and v, and a head whose two-sided solution does worse on it than GPTQ's, or moves the weights twice as far,
            gets GPTQ's; needs rows `boa` or `gauss_newton`.
        scale_steps: the codes are solved with so many larger and so many smaller scales too, 7 % apart, and each row
            (or head, where rows are joined) keeps those of the least loss.
        refits: rounds of refitting the scales to the codes and solving the codes again, kept where the loss falls.
        rounding_iterations: steps of learned rounding (AdaRound) on the stored loss, kept where the loss falls.
        sweeps: sweeps of coordinate descent on the codes at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    attention_rows: Literal["none", "boa", "gauss_newton", "aespa"] = "none"
    adaptive_rows: int | None = Field(default=None, ge=1)
    activation_order: bool = False
    recollect: bool = False
    deviation: float = Field(default=0.0, ge=0, le=1)
    residual: float = Field(default=0.0, ge=0, le=1)
    attention_sequences: int | None = Field(default=None, ge=1)
    compared_sequences: int | None = Field(default=None, ge=1)
    safety_net: bool = False
    scale_steps: int = Field(default=0, ge=0, le=5)
    refits: int = Field(default=0, ge=0, le=20)
    rounding_iterations: int = Field(default=0, ge=0, le=20000)
    sweeps: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _options_agree(self) -> Options:
        if self.adaptive_rows and self.activation_order:
            raise ValueError("adaptive_rows takes rows in their own order: set activation_order to false")
        if self.adaptive_rows and self.attention_rows not in ("boa", "gauss_newton"):
            raise ValueError(f"adaptive_rows is for {_TWO_SIDED}, not {self.attention_rows!r}: set it to null")
        if self.residual and not self.recollect:
            raise ValueError("residual needs every stage apart: set recollect to true")
        if self.residual and not self.deviation:
            raise ValueError("residual is a share of deviation, which is 0: set that above 0, or residual to 0")
        if self.safety_net and self.attention_rows not in ("boa", "gauss_newton"):
            raise ValueError(f"safety_net is for {_TWO_SIDED}, not {self.attention_rows!r}: set it to false")
        return self
