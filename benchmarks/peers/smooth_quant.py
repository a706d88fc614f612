"""llm-compressor's W4A8: SmoothQuant, then GPTQ with int8 activations per token, by its one-shot entry point."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch.utils.data import DataLoader

from benchmarks.peers.harness import Job, Made, linears_of, load_model, load_parameters, main


def make(job: Job) -> Made:
    """Quantize by the tool's defaults (smoothing strength 0.5)."""
    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=job.symmetric,
        strategy="group" if job.group_size else "channel",
        group_size=job.group_size,
    )
    activations = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    recipe = [SmoothQuantModifier(), GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]
    model = load_model(job)
    made = Made()
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
            made.weights[name] = fake_quantize(
                linear.weight,
                linear.weight_scale,
                getattr(linear, "weight_zero_point", None),
                linear.quantization_scheme.weights,
            )
        for name, parameter in model.named_parameters():
            if name in original and name not in made.weights and not torch.equal(parameter, original[name]):
                made.weights[name] = parameter
    made.notes.append("its runtime's activations are symmetric per token; evaluated here as the tables say")
    return made


if __name__ == "__main__":
    main("llmcompressor", make)
