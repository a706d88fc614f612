"""What the forms of a decoder have in common: cache inputs and outputs, norms, MLP, what stands between projections and
attention, float parameters, precision per linear.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir
import torch

from exporters.base import Activations
from exporters.onnx.activation import ACTIVATIONS
from exporters.onnx.cache import CacheScales, cache_scales
from exporters.onnx.graph import GraphBuilder, scope
from exporters.onnx.kernels import Carrier
from exporters.onnx.norm import layer_norm, rms_norm
from exporters.onnx.online import OnlineProducts
from exporters.onnx.rope import Rotation, rotate
from toolchain.activations import ActivationFormat, per_block
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import Checkpoint
from toolchain.families import LayerNames
from toolchain.quantized import QuantizedWeight
from toolchain.transforms import online_products

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True)
class Carried:
    """The codes of one linear in the graph.

    Attributes:
        bits: that they have in the checkpoint.
        carrier: how they stand in the graph.
        block: columns of the inputs that share an int8 scale; None where the inputs stay float32.
        by_graph: the graph rounds the inputs by itself, whatever the session's options.
    """

    bits: int
    carrier: Carrier
    block: int | None
    by_graph: bool = False


@dataclass
class DecoderBuilder(ABC):
    """Writes one decoder into `g`.

    Attributes:
        activations: of the quantized linears but for those that the checkpoint keeps in floating point.
        linears: the quantized linears by module name; filled while building.
        table: bits of an embedding table that no head shares, in the checkpoint and in the graph; None where there is
            none in codes; set while building.
        notes: what the user should know of this graph; filled while building.
    """

    g: GraphBuilder
    checkpoint: Checkpoint
    activations: Activations
    linears: dict[str, Carried] = field(default_factory=dict)
    table: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    @abstractmethod
    def build(self) -> None:
        """Append everything: inputs, embedding, layers, head, outputs."""

    @abstractmethod
    def linear(self, x: ir.Value, module: str) -> ir.Value:
        """x float32 [batch, sequence, in] -> float32 [batch, sequence, out], bias and all."""

    def carry(self, module: str, weight: QuantizedWeight, carrier: Carrier) -> Carrier:
        """Note how the codes of `module` stand in the graph."""
        rounds = carrier.fused and self.precision(module) == "int8"
        block = per_block.block_size(weight.group_size) if rounds else None
        self.linears[module] = Carried(weight.bits, carrier, block)
        return carrier

    @property
    def own_plan(self) -> ActivationPlan | None:
        """How the graph rounds inputs of linears whatever the session's options; None where it does not."""
        return self._plan(by_graph=True)

    @property
    def plan(self) -> ActivationPlan | None:
        """How inputs of linears are rounded with the session's options."""
        return self._plan(by_graph=False)

    def _plan(self, *, by_graph: bool) -> ActivationPlan | None:
        held = self.linears.items()
        sizes = {name: each.block for name, each in held if each.block is not None and each.by_graph >= by_graph}
        return ActivationPlan(ActivationFormat("per_block"), sizes) if sizes else None

    @cached_property
    def online(self) -> OnlineProducts:
        """The products that a rotated model owes."""
        return OnlineProducts(self.g, online_products(self.checkpoint.spec, self.checkpoint.transforms))

    def precision(self, module: str) -> Activations:
        """The precision of a linear's inputs: of all alike, but for those that the checkpoint spares."""
        plan = self.checkpoint.activations
        return "float32" if plan is not None and module in plan.kept else self.activations

    @property
    def cache_type(self) -> ir.DataType:
        """Of keys and values between two calls."""
        return FLOAT if self.checkpoint.kv_cache is None else ir.DataType.INT8

    def cache_inputs(self, shape: Sequence[int | str]) -> list[tuple[ir.Value, ir.Value]]:
        """Declare the past keys and values of every layer."""
        name, kind = "past_key_values.{}.{}".format, self.cache_type
        return [
            (self.g.input(name(i, "key"), kind, shape), self.g.input(name(i, "value"), kind, shape))
            for i in range(self.checkpoint.spec.layers)
        ]

    def cache_scales(self, layer: int, *, by_channel: bool) -> CacheScales | None:
        """Of a layer's codes; None where keys and values stay float32."""
        spec, plan = self.checkpoint.spec, self.checkpoint.kv_cache
        if plan is None:
            return None
        module = spec.layer_names[layer].q.rpartition(".")[0]
        return cache_scales(self.g, plan, spec, layer, module, by_channel=by_channel)

    def cache_outputs(self, presents: Sequence[tuple[ir.Value, ir.Value]], shape: Sequence[int | str]) -> None:
        """Make the keys and values of every layer outputs."""
        for i, (keys, values) in enumerate(presents):
            self.g.output(keys, f"present.{i}.key", self.cache_type, shape)
            self.g.output(values, f"present.{i}.value", self.cache_type, shape)

    def enter(self, x: ir.Value, position_ids: ir.Value | None) -> ir.Value:
        """Rows of the embedding table float32 [batch, sequence, width] -> the residual stream that they start.

        Args:
            position_ids: int64 [batch, sequence]; not read where positions are not learned.
        """
        g, spec = self.g, self.checkpoint.spec
        path = scope(spec.embedding)
        if spec.embedding_scale != 1.0:
            x = g.op("Mul", [x, g.constant(spec.embedding_scale, FLOAT)], f"{path}/scale/Mul")
        x = self.online.at(x, spec.embedding, "output", spec.hidden_size, path)
        if spec.position_table is None:
            return x
        assert position_ids is not None
        table, path = self.parameter(f"{spec.position_table}.weight"), scope(spec.position_table)
        # The rows before the first position's are for padding.
        offset = g.constant(table.shape[0] - spec.max_positions, INT64)
        ids = g.op("Add", [position_ids, offset], f"{path}/Add")
        rows = g.op("Gather", [g.floats(f"{spec.position_table}.weight", table), ids], f"{path}/Gather", axis=0)
        rows = self.online.at(rows, spec.position_table, "output", spec.hidden_size, path)
        return g.op("Add", [x, rows], f"{path}/sum/Add")

    def capped(self, logits: ir.Value, path: str) -> ir.Value:
        """Logits float32 [batch, positions, vocabulary] as the model gives them out."""
        g, cap = self.g, self.checkpoint.spec.logit_softcap
        if cap is None:
            return logits
        bound = g.constant(cap, FLOAT)
        squashed = g.op("Tanh", [g.op("Div", [logits, bound], f"{path}/softcap/Div")], f"{path}/softcap/Tanh")
        return g.op("Mul", [squashed, bound], f"{path}/softcap/Mul")

    def projections(self, h: ir.Value, names: LayerNames, *roles: str) -> tuple[ir.Value, ...]:
        """What `roles` make of h float32 [batch, sequence, width], also where they share a module."""
        parts = [names.parts()[role] for role in roles]
        modules = {part.module for part in parts}
        if len(modules) == len(parts):
            return tuple(self.linear(h, part.module) for part in parts)
        (module,) = modules
        sizes = self.g.constant([part.stop - part.start for part in parts if part.stop is not None], INT64)
        return self.g.ops("Split", [self.linear(h, module), sizes], f"{scope(module)}/Split", len(parts), axis=2)

    def heads(self, h: ir.Value, names: LayerNames, turn: Rotation | None) -> tuple[ir.Value, ...]:
        """q, k and v float32 [batch, sequence, heads * head_dim]; q and k normed, turned and multiplied by what they
        owe, where the model does so.
        """
        spec = self.checkpoint.spec
        q, k, v = self.projections(h, names, "q", "k", "v")
        attention = names.q.rpartition(".")[0]
        found = []
        for role, x, count in (("q", q, spec.heads), ("k", k, spec.kv_heads)):
            module = names.head_norms().get(role)
            path = f"{scope(attention)}/{role}"
            if module is not None:
                x = self._head_norm(x, module, count)
            if turn is not None:
                x = rotate(self.g, x, turn, count, spec.head_dim, path)
            found.append(self.online.at(x, attention, "query_key", count * spec.head_dim, path))
        return (*found, v)

    def _head_norm(self, x: ir.Value, module: str, heads: int) -> ir.Value:
        """Each head of q or k by itself."""
        g, size = self.g, self.checkpoint.spec.head_dim
        split = g.op("Reshape", [x, g.constant([0, 0, heads, size], INT64)], f"{scope(module)}/Reshape")
        whole = g.constant([0, 0, heads * size], INT64)
        return g.op("Reshape", [self.norm(split, module), whole], f"{scope(module)}/ReshapeBack")

    def mlp(self, h: ir.Value, names: LayerNames) -> ir.Value:
        """down(activation(gate) * up), or down(activation(up)) without a gate."""
        g, spec = self.g, self.checkpoint.spec
        path = scope(names.up).rpartition("/")[0]
        if names.gate is None:
            (up,) = self.projections(h, names, "up")
            product = self.activation(up, f"{path}/{spec.activation}")
        else:
            gate, up = self.projections(h, names, "gate", "up")
            product = g.op("Mul", [self.activation(gate, f"{path}/{spec.activation}"), up], f"{path}/Mul")
        product = self.online.at(product, names.down, "input", spec.intermediate_size, scope(names.down))
        return self.linear(product, names.down)

    def activation(self, x: ir.Value, path: str) -> ir.Value:
        """The MLP's, of x float32 [...]."""
        return ACTIVATIONS[self.checkpoint.spec.activation](self.g, x, path)

    def after(self, y: ir.Value, module: str | None) -> ir.Value:
        """What a sublayer puts out, as it is added to the residual stream."""
        return y if module is None else self.norm(y, module)

    def norm(self, x: ir.Value, module: str) -> ir.Value:
        """x float32 [..., width], normed."""
        spec = self.checkpoint.spec
        if spec.norm == "layer":
            bias = self.parameter(f"{module}.bias")
            return layer_norm(self.g, x, module, self.norm_weight(module), bias, spec.norm_eps)
        return rms_norm(self.g, x, module, self.norm_weight(module), spec.norm_eps)

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
