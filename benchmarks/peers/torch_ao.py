"""torchao's integer weight-only quantization (`IntxWeightOnlyConfig`): round to nearest, or its HQQ scale search."""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from benchmarks.peers.harness import BLOCKS, Job, Made, linears_of, load_model, main


def make(job: Job) -> Made:
    """Quantize by `quantize_`, as its documentation does for a model."""
    algorithms = IntxChooseQParamsAlgorithm
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job.bits}"),
        granularity=PerGroup(job.group_size) if job.group_size else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if job.symmetric else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=algorithms.HQQ_SCALE_ONLY if job.variant == "hqq" else algorithms.AFFINE,
    )
    model = load_model(job)
    names = list(linears_of(model))
    made = Made(notes=["needs no calibration data"])

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.startswith(BLOCKS)

    with made.timed(), torch.no_grad():
        quantize_(model, config, chosen)
    made.weights = {name: model.get_parameter(name).dequantize() for name in names}
    return made


if __name__ == "__main__":
    main("torchao", make, ("rtn", "hqq"))
