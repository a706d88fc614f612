"""The quantization methods by name. A new method is one line in METHODS: a set of options, or a solver of its own."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.grids import ScaleSearch
from toolchain.options import Options


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        options: None for a method that needs no statistics.
    """

    title: str
    options: Options | None
    default_search: ScaleSearch = "hessian"


METHODS: dict[str, Method] = {
    "rtn": Method("round to nearest", None, "minmax"),
    "gptq": Method("GPTQ", Options()),
    "boa": Method("BoA", Options(attention_rows="boa")),
    "turboboa": Method("TurboBoA", Options(attention_rows="boa", adaptive_rows=16, deviation=0.25, refits=1)),
    # Published: 2000 steps. 500 at twice the rate come within 5 % of that loss in a quarter of the time (docs/log.md).
    "aespa": Method("aespa", Options(attention_rows="aespa", rounding_iterations=500)),
    "edge": Method(
        "BoA Edge",
        Options(
            attention_rows="gauss_newton",
            activation_order=True,
            recollect=True,
            deviation=0.5,
            residual=0.5,
            safety_net=True,
            attention_sequences=32,
            compared_sequences=64,
            scale_steps=1,
            refits=1,
            sweeps=2,
        ),
        default_search="compensated",
    ),
}
