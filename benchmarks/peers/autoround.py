"""AutoRound: rounding and clipping trained by signed gradient descent, block by block."""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.peers.harness import GridError, Job, Made, linears_of, load_model, main

# Steps per block and their rate: the tool's defaults, and its documentation's `light` settings.
STEPS: dict[str, tuple[int, float | None]] = {"default": (200, None), "light": (50, 5e-3)}
_ROUNDED = 2.0**-8  # what bfloat16 rounds away of a number, at most


def make(job: Job) -> Made:
    """Quantize by the tool's defaults, or by its light settings."""
    model = load_model(job)
    iterations, rate = STEPS[job.variant]
    made = Made(notes=[f"{iterations} iterations per block"])
    tuner = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        scheme="W4A16",
        bits=job.bits,
        group_size=job.group_size or -1,
        sym=job.symmetric,
        iters=iterations,
        lr=rate,
        nsamples=job.tokens.shape[0],
        seqlen=job.tokens.shape[1],
        dataset=list(job.tokens.split(1)),
        seed=job.seed,
        device_map="cpu",
        low_cpu_mem_usage=False,
        enable_torch_compile=False,  # on two cores the compiler alone took minutes
    )
    with made.timed():
        model, _ = tuner.quantize()
    made.weights = {name: on_grid(linear) for name, linear in linears_of(model).items()}
    return made


def on_grid(linear: Any) -> Tensor:
    """The weight that the codes stand for, float32 [out, in]: the tool leaves it in bfloat16 where the processor has
    that type, which is next to the grid.
    """
    weight = linear.weight.detach().to(torch.float32)
    scales = linear.scale.detach().to(torch.float32).reshape(weight.shape[0], -1)
    steps = scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    levels = (weight / steps).round()
    off = float((weight - levels * steps).abs().max() / weight.abs().max())
    if off > _ROUNDED:
        raise GridError(f"a weight lies {off:.2g} of the largest beside the grid of its scales")
    return levels * steps


if __name__ == "__main__":
    main("auto-round", make, tuple(STEPS))
