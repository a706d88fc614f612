"""What the forms of a decoder have in common: cache inputs and outputs, float parameters, precision per linear."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir
import torch

from exporters.base import Activations
from exporters.onnx.graph import GraphBuilder
from exporters.onnx.kernels import Carrier
from exporters.onnx.norm import rms_norm
from exporters.onnx.online import OnlineProducts
from toolchain.checkpoint import Checkpoint
from toolchain.transforms import online_products

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass
class DecoderBuilder(ABC):
    """Writes one decoder into `g`.

    Attributes:
        activations: of the quantized linears but for those that the checkpoint keeps in floating point.
        linears: how the codes of each quantized linear are carried, by module name; filled while building.
    """

    g: GraphBuilder
    checkpoint: Checkpoint
    activations: Activations
    linears: dict[str, Carrier] = field(default_factory=dict)

    @abstractmethod
    def build(self) -> None:
        """Append everything: inputs, embedding, layers, head, outputs."""

    @cached_property
    def online(self) -> OnlineProducts:
        """The products that a rotated model owes."""
        return OnlineProducts(self.g, online_products(self.checkpoint.spec, self.checkpoint.transforms))

    def precision(self, module: str) -> Activations:
        """The precision of a linear's inputs: of all alike, but for those that the checkpoint spares."""
        plan = self.checkpoint.activations
        return "float32" if plan is not None and module in plan.kept else self.activations

    def cache_inputs(self, shape: Sequence[int | str]) -> list[tuple[ir.Value, ir.Value]]:
        """Declare the past keys and values of every layer."""
        name = "past_key_values.{}.{}".format
        return [
            (self.g.input(name(i, "key"), FLOAT, shape), self.g.input(name(i, "value"), FLOAT, shape))
            for i in range(self.checkpoint.spec.layers)
        ]

    def cache_outputs(self, presents: Sequence[tuple[ir.Value, ir.Value]], shape: Sequence[int | str]) -> None:
        """Make the keys and values of every layer outputs."""
        for i, (keys, values) in enumerate(presents):
            self.g.output(keys, f"present.{i}.key", FLOAT, shape)
            self.g.output(values, f"present.{i}.value", FLOAT, shape)

    def norm(self, x: ir.Value, module: str) -> ir.Value:
        """x float32 [..., width], normed."""
        return rms_norm(self.g, x, module, self.norm_weight(module), self.checkpoint.spec.norm_eps)

    def norm_weight(self, module: str) -> np.ndarray:
        """What a norm multiplies by, float32 [width]."""
        weight = self.parameter(f"{module}.weight")
        return weight + np.float32(1) if self.checkpoint.spec.norm == "rms_offset" else weight

    def parameter(self, name: str) -> np.ndarray:
        """A stored tensor, in float32."""
        return self.checkpoint.tensor(name).to(torch.float32).numpy()

    def bias(self, name: str, modules: Sequence[str]) -> ir.Value | None:
        """The biases of `modules` behind each other as `name`.bias, float32 [rows]; None if none has one."""
        if not any(self.checkpoint.has(f"{module}.bias") for module in modules):
            return None
        parts = [
            self.parameter(f"{module}.bias")
            if self.checkpoint.has(f"{module}.bias")
            else np.zeros(self.checkpoint.quantized(module).shape[0], np.float32)
            for module in modules
        ]
        return self.g.floats(f"{name}.bias", np.concatenate(parts))
