"""torchao's int8 dynamic activations with int4 weights, the configuration that ExecuTorch's own exporters lower."""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from benchmarks.peers.harness import BLOCKS, Job, Made, linears_of, load_model, main


def make(job: Job) -> Made:
    """Quantize by `quantize_` with the tool's defaults; what is read back is the weights, rounded to nearest."""
    assert job.group_size is not None
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{job.bits}"), weight_granularity=PerGroup(job.group_size)
    )
    model = load_model(job)
    names = list(linears_of(model))
    made = Made(notes=["needs no calibration data; every linear has int8 activations"])

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.startswith(BLOCKS)

    with made.timed(), torch.no_grad():
        quantize_(model, config, chosen)
    made.weights = {name: model.get_parameter(name).dequantize() for name in names}
    return made


if __name__ == "__main__":
    main("torchao", make)
