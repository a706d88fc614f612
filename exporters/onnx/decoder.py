"""A Llama-type decoder with its cache as inputs and outputs, layer by layer from a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir
import torch

from boa_edge.progress import track
from exporters.base import Activations
from exporters.onnx.attention import attend, attention_bias
from exporters.onnx.embedding import float_embedding, quantized_embedding, tied_embedding, tied_float_head
from exporters.onnx.graph import GraphBuilder, scope
from exporters.onnx.kernels import Carrier, carrier
from exporters.onnx.linears import add_bias, float_linear, precise_linear, quantized_linear, store
from exporters.onnx.norm import rms_norm
from exporters.onnx.online import OnlineProducts
from exporters.onnx.rope import Rotation, rotate, rotation
from toolchain.checkpoint import Checkpoint
from toolchain.families import LayerNames
from toolchain.transforms import online_products

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass
class DecoderBuilder:
    """Writes one decoder into `g`.

    Attributes:
        activations: of the quantized linears but for those that the checkpoint keeps in floating point.
        linears: how the codes of each quantized linear are carried, by module name; filled while building.
    """

    g: GraphBuilder
    checkpoint: Checkpoint
    activations: Activations
    linears: dict[str, Carrier] = field(default_factory=dict)

    def build(self) -> None:
        """Append everything: inputs, embedding, layers, head, outputs."""
        g, spec = self.g, self.checkpoint.spec
        input_ids = g.input("input_ids", _INT64, ["batch", "sequence"])
        attention_mask = g.input("attention_mask", _INT64, ["batch", "total"])
        position_ids = g.input("position_ids", _INT64, ["batch", "sequence"])
        cache: list[int | str] = ["batch", spec.kv_heads, "past", spec.head_dim]
        pasts = [
            (
                g.input(f"past_key_values.{i}.key", _FLOAT, cache),
                g.input(f"past_key_values.{i}.value", _FLOAT, cache),
            )
            for i in range(spec.layers)
        ]
        turn = rotation(g, position_ids, spec)
        bias = attention_bias(g, input_ids, attention_mask)
        x, head = self._embedding(input_ids)
        x = self._online.at(x, spec.embedding, "output", spec.hidden_size, scope(spec.embedding))
        presents = []
        for names, past in track(list(zip(spec.layer_names, pasts, strict=True)), "writing layers"):
            x, present = self._layer(x, names, turn, bias, past)
            presents.append(present)
        x = self._online.at(x, spec.final_norm, "input", spec.hidden_size, scope(spec.final_norm))
        x = self._norm(x, spec.final_norm)
        g.output(head(x), "logits", _FLOAT, ["batch", "sequence", spec.vocab_size])
        grown: list[int | str] = ["batch", spec.kv_heads, "total", spec.head_dim]
        for i, (keys, values) in enumerate(presents):
            g.output(keys, f"present.{i}.key", _FLOAT, grown)
            g.output(values, f"present.{i}.value", _FLOAT, grown)

    def _layer(
        self, x: ir.Value, names: LayerNames, turn: Rotation, bias: ir.Value, past: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        g, spec = self.g, self.checkpoint.spec
        h = self._norm(x, names.attention_norm)
        q, k, v = (self._linear(h, name) for name in (names.q, names.k, names.v))
        q = rotate(g, q, turn, spec.heads, scope(names.q))
        k = rotate(g, k, turn, spec.kv_heads, scope(names.k))
        attention = names.q.rpartition(".")[0]
        q = self._online.at(q, attention, "query_key", spec.heads * spec.head_dim, scope(names.q))
        k = self._online.at(k, attention, "query_key", spec.kv_heads * spec.head_dim, scope(names.k))
        context, keys, values = attend(g, q, k, v, bias, past, spec, scope(names.q).rpartition("/")[0])
        x = self._add(x, self._linear(context, names.o), names.o)
        h = self._norm(x, names.mlp_norm)
        assert names.gate is not None
        gate, up = self._linear(h, names.gate), self._linear(h, names.up)
        path = scope(names.gate).rpartition("/")[0]
        sigmoid = g.op("Sigmoid", [gate], f"{path}/silu/Sigmoid")
        gate = g.op("Mul", [gate, sigmoid], f"{path}/silu/Mul")
        product = g.op("Mul", [gate, up], f"{path}/Mul")
        product = self._online.at(product, names.down, "input", spec.intermediate_size, scope(names.down))
        return self._add(x, self._linear(product, names.down), names.down), (keys, values)

    def _add(self, x: ir.Value, y: ir.Value, module: str) -> ir.Value:
        return self.g.op("Add", [x, y], f"{scope(module)}/residual/Add")

    def _norm(self, x: ir.Value, module: str) -> ir.Value:
        return rms_norm(self.g, x, module, self._float(f"{module}.weight"), self.checkpoint.spec.norm_eps)

    def _linear(self, x: ir.Value, module: str) -> ir.Value:
        if self.checkpoint.is_quantized(module):
            weight = self.checkpoint.quantized(module)
            activations = self._activations(module)
            chosen = self.linears[module] = carrier(weight.bits, weight.group_size, activations)
            if activations != self.activations and chosen.fused:
                y = precise_linear(self.g, x, module, weight)
            else:
                y = quantized_linear(self.g, x, module, store(self.g, module, weight, chosen))
        else:
            y = float_linear(self.g, x, module, self._float(f"{module}.weight"))
        if self.checkpoint.has(f"{module}.bias"):
            y = add_bias(self.g, y, module, self._float(f"{module}.bias"))
        return y

    def _activations(self, module: str) -> Activations:
        """The precision of a linear's inputs: of all alike, but for those that the checkpoint spares."""
        plan = self.checkpoint.activations
        return "float32" if plan is not None and module in plan.kept else self.activations

    @cached_property
    def _online(self) -> OnlineProducts:
        return OnlineProducts(self.g, online_products(self.checkpoint.spec, self.checkpoint.transforms))

    def _embedding(self, ids: ir.Value) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
        """The embedded tokens, and the function that later turns the last hidden state into logits."""
        g, checkpoint, spec = self.g, self.checkpoint, self.checkpoint.spec
        if checkpoint.is_quantized(spec.embedding):
            table = checkpoint.quantized(spec.embedding)
            if not spec.tied_embeddings:
                return quantized_embedding(g, ids, spec.embedding, table), lambda x: self._linear(x, spec.head)
            # Gather reads no type below a byte, and the table shall be stored once: 8 bits for both of its uses.
            chosen = self.linears[spec.head] = carrier(8, table.group_size, self._activations(spec.head))
            stored = store(g, spec.head, table, chosen)
            x = tied_embedding(g, ids, spec.embedding, stored)
            return x, lambda x: quantized_linear(g, x, spec.head, stored)
        x, source = float_embedding(g, ids, spec.embedding, self._float(f"{spec.embedding}.weight"))
        if spec.tied_embeddings:
            return x, lambda x: tied_float_head(g, x, spec.head, source)
        return x, lambda x: self._linear(x, spec.head)

    def _float(self, name: str) -> np.ndarray:
        return self.checkpoint.tensor(name).to(torch.float32).numpy()
