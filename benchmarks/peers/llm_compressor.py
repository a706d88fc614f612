"""llm-compressor: GPTQ and AWQ by its one-shot entry point."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader

from benchmarks.peers.harness import BLOCKS, Job, Made, linears_of, load_model, load_parameters, main


def make(job: Job) -> Made:
    """Quantize by the tool's defaults (GPTQ: activation order `static`; AWQ: duo scaling, 20 grid points)."""
    arguments = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=job.symmetric,
        strategy="group" if job.group_size else "channel",
        group_size=job.group_size,
    )
    common: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)},
        "ignore": ["lm_head"],
    }
    recipe = [GPTQModifier(**common)] if job.variant == "gptq" else [AWQModifier(), QuantizationModifier(**common)]
    model = load_model(job)
    made = Made()
    if job.variant == "awq" and not torch.accelerator.is_available():
        # Version 0.14.0.1 pins memory for a faster way to an accelerator, which fails where there is none.
        IntermediatesCache.pin_memory = lambda *_: None
        made.notes.append("its memory pinning, which needs an accelerator, was switched off")
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.tokens]
    with made.timed():
        oneshot(
            model=model,
            dataset=DataLoader(rows, batch_size=1),
            recipe=recipe,
            num_calibration_samples=len(rows),
            max_seq_length=job.tokens.shape[1],
        )
    original = load_parameters(job.model)
    with torch.no_grad():
        for name, module in linears_of(model).items():
            linear: Any = module
            # Idempotent for GPTQ, which leaves the quantized values; AWQ leaves the scaled ones.
            made.weights[name] = fake_quantize(
                linear.weight,
                linear.weight_scale,
                getattr(linear, "weight_zero_point", None),
                linear.quantization_scheme.weights,
            )
        for name, parameter in model.named_parameters():
            if name in original and name not in made.weights and not torch.equal(parameter, original[name]):
                made.weights[name] = parameter
    others = [name for name in made.weights if original[name].ndim == 1 and name.startswith(BLOCKS)]
    if others:
        made.notes.append(f"{len(others)} norms hold the scales")
    return made


if __name__ == "__main__":
    main("llmcompressor", make, ("gptq", "awq"))
