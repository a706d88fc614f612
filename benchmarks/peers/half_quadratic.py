"""HQQ (the package `hqq`): half-quadratic optimization of the zero point, no calibration data."""

from __future__ import annotations

import torch
from hqq.core.quantize import HQQLinear, Quantizer, hqq_base_quant_config

from benchmarks.peers.harness import Job, Made, linears_of, load_model, main


def make(job: Job) -> Made:
    """Quantize by the package's own settings for a group size along the inputs (axis 1)."""
    made = Made(notes=["needs no calibration data; zero points are not integers"])
    linears = linears_of(load_model(job))
    with made.timed(), torch.inference_mode():
        for name, linear in linears.items():
            # A whole row is a group where scales are per channel: hqq has no other way to say so.
            size = job.group_size or linear.in_features
            config = hqq_base_quant_config(nbits=job.bits, group_size=size, axis=1)
            quantized = HQQLinear(
                linear, quant_config=config, compute_dtype=torch.float32, device="cpu", del_orig=False
            )
            made.weights[name] = Quantizer.dequantize(quantized.W_q, quantized.meta)
    return made


if __name__ == "__main__":
    main("hqq", make)
