"""onnxruntime-genai's model builder at int4 by its defaults; its codes and scales are read back from its graph."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from benchmarks.peers.harness import Job, Made, block_linears, load_parameters, main


def make(job: Job) -> Made:
    """Build for the CPU at int4, which is round to nearest in groups of 32 with int8 activations at run time."""
    made = Made(in_child=True, notes=["needs no calibration data; packed q, k and v are taken apart again"])
    with tempfile.TemporaryDirectory(dir=job.out) as scratch:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(job.model), "-o", scratch]
        command += ["-p", "int4", "-e", "cpu", "-c", f"{scratch}/cache"]
        with made.timed():
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        built = _weights(Path(scratch) / "model.onnx")
    original = load_parameters(job.model)
    for name in block_linears(original):
        module = name.removesuffix(".weight")
        if module in built:
            made.weights[name] = built[module]
            continue
        owner, _, leaf = module.rpartition(".")
        # One matrix for q, k and v; and for gate and up in some versions.
        joined = next(other for other in built if other.startswith(f"{owner}.") and leaf[0] in other.rpartition(".")[2])
        start = 0
        for sibling in [f"{owner}.{each}" for each in ("q_proj", "k_proj", "v_proj")]:
            rows = original[f"{sibling}.weight"].shape[0]
            if sibling == module:
                made.weights[name] = built[joined][start : start + rows]
            start += rows
    return made


def _weights(path: Path) -> dict[str, Tensor]:
    """What the codes of every MatMulNBits node in a block stand for, [out, in], by module name."""
    found: dict[str, Tensor] = {}
    model = ir.load(path)
    for node in model.graph:
        if node.op_type != "MatMulNBits" or "/layers." not in (node.name or ""):
            continue
        rows, columns, block = (node.attributes[key].as_int() for key in ("N", "K", "block_size"))
        held = [None if value is None else value.const_value for value in node.inputs[1:4]]
        values = [None if tensor is None else tensor.numpy() for tensor in held]
        nibbles = np.asarray(values[0], np.uint8).reshape(rows, -1)
        codes = np.stack([nibbles & 15, nibbles >> 4], -1).reshape(rows, -1)[:, :columns].astype(np.float32)
        scales = np.asarray(values[1], np.float32).reshape(rows, -1)
        zeros = np.full_like(scales, 8.0)
        if len(values) > 2 and values[2] is not None:
            packed = np.asarray(values[2], np.uint8).reshape(rows, -1)
            zeros = np.stack([packed & 15, packed >> 4], -1).reshape(rows, -1)[:, : scales.shape[1]].astype(np.float32)
        expand = [np.repeat(each, block, 1)[:, :columns] for each in (scales, zeros)]
        module = (node.name or "").strip("/").replace("/", ".").removesuffix(".MatMulNBits").removesuffix(".MatMul")
        module = module.removesuffix("_Q4").removesuffix(".MatMul").replace(".attn.", ".self_attn.")
        found[module] = torch.from_numpy(expand[0] * (codes - expand[1]))
    return found


if __name__ == "__main__":
    main("onnxruntime-genai", make)
