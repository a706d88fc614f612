"""GPTQModel: its GPTQ by its own `quantize`, read back from the layers that it packed."""

from __future__ import annotations

import os

# The tool gives itself one CPU worker on two cores, then fails asking for two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.extension import load as load_extension

from benchmarks.peers.harness import Job, Made, block_linears, load_parameters, main


def make(job: Job) -> Made:
    """Quantize by the tool's defaults (activation order: group-aware; plain where a row has one scale)."""
    made = Made(notes=["float16 scales, as the tool packs them"])
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size or -1,
        sym=job.symmetric,
        desc_act=job.group_size is None,  # costs a runtime nothing where a row has one scale
        act_group_aware=job.group_size is not None,  # its default, which it refuses without groups
        format="gptq_v2",  # the older format stores zero points less one, and so do its layers in memory
        offload_to_disk=False,
        device="cpu",
    )
    model = GPTQModel.load(str(job.model), config, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.tokens]
    load_extension(name="pack_block_cpu")  # compiled at its first use ever: not part of the quantization's time
    with made.timed():
        model.quantize(rows, batch_size=1)
    for name in block_linears(load_parameters(job.model)):
        layer = model.model.get_submodule(name.removesuffix(".weight"))
        layer.scales = layer.scales.to(torch.float32)
        made.weights[name] = layer.dequantize_weight().T
    return made


if __name__ == "__main__":
    main("gptqmodel", make)
