"""optimum-quanto: round to nearest on an affine grid, no calibration data."""

from __future__ import annotations

import torch
from optimum.quanto import HqqOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight

from benchmarks.peers.harness import Job, Made, linears_of, load_model, main

_TYPES = {2: qint2, 4: qint4, 8: qint8}


def make(job: Job) -> Made:
    """Quantize each weight by the package's tensor function: its module API fixes the group size."""
    made = Made(notes=["needs no calibration data"])
    optimizer = HqqOptimizer() if job.variant == "hqq" else MaxOptimizer()
    linears = linears_of(load_model(job))
    with made.timed(), torch.inference_mode():
        for name, linear in linears.items():
            qtype = _TYPES[job.bits]
            scale, shift = optimizer(linear.weight, qtype=qtype, axis=0, group_size=job.group_size)
            quantized = quantize_weight(
                linear.weight, qtype=qtype, axis=0, scale=scale, shift=shift, group_size=job.group_size, optimized=False
            )
            made.weights[name] = quantized.dequantize()
    return made


if __name__ == "__main__":
    main("optimum-quanto", make, ("max", "hqq"))
