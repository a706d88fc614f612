"""The `qdq` form: standard operators only, integer codes behind DequantizeLinear, fused by ONNX Runtime at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from boa_edge.progress import track
from exporters.onnx.attention import attend, attention_bias
from exporters.onnx.decoder import FLOAT, INT64, DecoderBuilder
from exporters.onnx.embedding import float_embedding, quantized_embedding, tied_embedding, tied_float_head
from exporters.onnx.graph import scope
from exporters.onnx.kernels import carrier
from exporters.onnx.linears import add_bias, float_linear, quantized_linear, store
from exporters.onnx.nbits import nbits_linear, store_nbits
from exporters.onnx.rope import Rotation, rotate, rotation
from toolchain.families import LayerNames


@dataclass
class QdqDecoder(DecoderBuilder):
    """Writes a decoder that any runtime of standard ONNX can read."""

    def build(self) -> None:
        g, spec = self.g, self.checkpoint.spec
        input_ids = g.input("input_ids", INT64, ["batch", "sequence"])
        attention_mask = g.input("attention_mask", INT64, ["batch", "total"])
        position_ids = g.input("position_ids", INT64, ["batch", "sequence"])
        cache: list[int | str] = ["batch", spec.kv_heads, "past", spec.head_dim]
        pasts = self.cache_inputs(cache)
        turn = rotation(g, position_ids, spec)
        bias = attention_bias(g, input_ids, attention_mask)
        x, head = self._embedding(input_ids)
        x = self.online.at(x, spec.embedding, "output", spec.hidden_size, scope(spec.embedding))
        presents = []
        for names, past in track(list(zip(spec.layer_names, pasts, strict=True)), "writing layers"):
            x, present = self._layer(x, names, turn, bias, past)
            presents.append(present)
        x = self.online.at(x, spec.final_norm, "input", spec.hidden_size, scope(spec.final_norm))
        x = self.norm(x, spec.final_norm)
        g.output(head(x), "logits", FLOAT, ["batch", "sequence", spec.vocab_size])
        self.cache_outputs(presents, ["batch", spec.kv_heads, "total", spec.head_dim])

    def _layer(
        self, x: ir.Value, names: LayerNames, turn: Rotation, bias: ir.Value, past: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        g, spec = self.g, self.checkpoint.spec
        h = self.norm(x, names.attention_norm)
        q, k, v = (self._linear(h, name) for name in (names.q, names.k, names.v))
        q = rotate(g, q, turn, spec.heads, scope(names.q))
        k = rotate(g, k, turn, spec.kv_heads, scope(names.k))
        attention = names.q.rpartition(".")[0]
        q = self.online.at(q, attention, "query_key", spec.heads * spec.head_dim, scope(names.q))
        k = self.online.at(k, attention, "query_key", spec.kv_heads * spec.head_dim, scope(names.k))
        context, keys, values = attend(g, q, k, v, bias, past, spec, scope(names.q).rpartition("/")[0])
        x = self._add(x, self._linear(context, names.o), names.o)
        h = self.norm(x, names.mlp_norm)
        assert names.gate is not None
        gate, up = self._linear(h, names.gate), self._linear(h, names.up)
        path = scope(names.gate).rpartition("/")[0]
        sigmoid = g.op("Sigmoid", [gate], f"{path}/silu/Sigmoid")
        gate = g.op("Mul", [gate, sigmoid], f"{path}/silu/Mul")
        product = g.op("Mul", [gate, up], f"{path}/Mul")
        product = self.online.at(product, names.down, "input", spec.intermediate_size, scope(names.down))
        return self._add(x, self._linear(product, names.down), names.down), (keys, values)

    def _add(self, x: ir.Value, y: ir.Value, module: str) -> ir.Value:
        return self.g.op("Add", [x, y], f"{scope(module)}/residual/Add")

    def _linear(self, x: ir.Value, module: str) -> ir.Value:
        if self.checkpoint.is_quantized(module):
            weight = self.checkpoint.quantized(module)
            activations = self.precision(module)
            chosen = self.linears[module] = carrier(weight.bits, weight.group_size, activations)
            if activations != self.activations and chosen.fused:
                # The precision of a fused DequantizeLinear is the session's, so this one is the fused kernel itself.
                stored = store_nbits(self.g, module, [weight], chosen.dtype.bitwidth)
                y = nbits_linear(self.g, x, scope(module), stored, activations)
            else:
                y = quantized_linear(self.g, x, module, store(self.g, module, weight, chosen))
        else:
            y = float_linear(self.g, x, module, self.parameter(f"{module}.weight"))
        bias = self.bias(module, (module,))
        return y if bias is None else add_bias(self.g, y, module, bias)

    def _embedding(self, ids: ir.Value) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
        """The embedded tokens, and the function that later turns the last hidden state into logits."""
        g, checkpoint, spec = self.g, self.checkpoint, self.checkpoint.spec
        if checkpoint.is_quantized(spec.embedding):
            table = checkpoint.quantized(spec.embedding)
            if not spec.tied_embeddings:
                return quantized_embedding(g, ids, spec.embedding, table), lambda x: self._linear(x, spec.head)
            # Gather reads no type below a byte, and the table shall be stored once: 8 bits for both of its uses.
            chosen = self.linears[spec.head] = carrier(8, table.group_size, self.precision(spec.head))
            stored = store(g, spec.head, table, chosen)
            x = tied_embedding(g, ids, spec.embedding, stored)
            return x, lambda x: quantized_linear(g, x, spec.head, stored)
        x, source = float_embedding(g, ids, spec.embedding, self.parameter(f"{spec.embedding}.weight"))
        if spec.tied_embeddings:
            return x, lambda x: tied_float_head(g, x, spec.head, source)
        return x, lambda x: self._linear(x, spec.head)
