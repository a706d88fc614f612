"""The `qdq` form: standard operators only, integer codes behind DequantizeLinear, fused by ONNX Runtime at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from boa_edge.progress import track
from exporters.base import Activations
from exporters.onnx.attention import attend, attention_bias, attention_places
from exporters.onnx.decoder import FLOAT, INT64, DecoderBuilder
from exporters.onnx.embedding import float_embedding, quantized_embedding, tied_embedding, tied_float_head
from exporters.onnx.graph import scope
from exporters.onnx.kernels import Carrier, carrier, dequantized_carrier, static_carrier
from exporters.onnx.linears import add_bias, float_linear, quantized_linear, store
from exporters.onnx.nbits import nbits_linear, store_nbits
from exporters.onnx.rope import Rotation, rotations, turn_of
from exporters.onnx.static import StaticActivations, static_plan
from toolchain.activations.plan import ActivationPlan
from toolchain.quantized import QuantizedWeight


@dataclass
class QdqDecoder(DecoderBuilder):
    """Writes a decoder that any runtime of standard ONNX can read."""

    @cached_property
    def static(self) -> StaticActivations | None:
        """Of a plan with ranges from calibration; None for one that quantizes as the model runs, or for none."""
        plan = static_plan(self.checkpoint, self.activations)
        return None if plan is None else StaticActivations(self.g, plan)

    def build(self) -> None:
        g, spec = self.g, self.checkpoint.spec
        input_ids = g.input("input_ids", INT64, ["batch", "sequence"])
        attention_mask = g.input("attention_mask", INT64, ["batch", "total"])
        position_ids = g.input("position_ids", INT64, ["batch", "sequence"])
        cache: list[int | str] = ["batch", spec.kv_heads, "past", spec.head_dim]
        pasts = self.cache_inputs(cache)
        turns = rotations(g, position_ids, spec)
        biases = self._biases(input_ids, attention_mask)
        x, head = self._embedding(input_ids)
        x = self.enter(x, position_ids)
        presents = []
        for layer in track(range(spec.layers), "writing layers"):
            turn, bias = turns.get(turn_of(spec.attention[layer])), biases[spec.attention[layer].window]
            x, present = self._layer(x, layer, turn, bias, pasts[layer])
            presents.append(present)
        x = self.online.at(x, spec.final_norm, "input", spec.hidden_size, scope(spec.final_norm))
        x = self.norm(x, spec.final_norm)
        x = self.online.at(x, spec.head, "input", spec.hidden_size, scope(spec.head))
        logits = self.capped(head(x), scope(spec.head))
        g.output(logits, "logits", FLOAT, ["batch", "sequence", spec.vocab_size])
        self.cache_outputs(presents, ["batch", spec.kv_heads, "total", spec.head_dim])

    def _biases(self, input_ids: ir.Value, attention_mask: ir.Value) -> dict[int | None, ir.Value]:
        """What is added to the scores, by window; one that is no shorter than any text is none."""
        spec = self.checkpoint.spec
        places = attention_places(self.g, input_ids, attention_mask)
        made: dict[int | None, ir.Value] = {}
        for window in dict.fromkeys(each.window for each in spec.attention):
            real = None if window is None or window >= spec.max_positions else window
            if real not in made:
                made[real] = attention_bias(self.g, places, real)
            made[window] = made[real]
        return made

    def _layer(
        self,
        x: ir.Value,
        layer: int,
        turn: Rotation | None,
        bias: ir.Value,
        past: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        spec = self.checkpoint.spec
        names = spec.layer_names[layer]
        q, k, v = self.heads(self.norm(x, names.attention_norm), names, turn)
        scales = self.cache_scales(layer, by_channel=False)
        context, keys, values = attend(self.g, q, k, v, bias, past, spec, scope(names.q).rpartition("/")[0], scales)
        x = self._add(x, self.after(self.linear(context, names.o), names.attention_output_norm), names.o)
        y = self.mlp(self.norm(x, names.mlp_norm), names)
        return self._add(x, self.after(y, names.mlp_output_norm), names.down), (keys, values)

    def _add(self, x: ir.Value, y: ir.Value, module: str) -> ir.Value:
        return self.g.op("Add", [x, y], f"{scope(module)}/residual/Add")

    def linear(self, x: ir.Value, module: str) -> ir.Value:
        if self.checkpoint.is_quantized(module):
            weight = self.checkpoint.quantized(module)
            activations = self.precision(module)
            chosen = self.carry(module, weight, self._carrier(module, weight))
            if self.static is not None:
                x = self.static.at(x, module, scope(module))
            if self.static is None and activations != self.activations and chosen.fused:
                # The precision of a fused DequantizeLinear is the session's, so this one is the fused kernel itself.
                stored = store_nbits(self.g, module, [weight], chosen.dtype.bitwidth)
                y = nbits_linear(self.g, x, scope(module), stored, activations)
            else:
                y = quantized_linear(self.g, x, module, store(self.g, module, weight, chosen))
        else:
            y = float_linear(self.g, x, module, self.parameter(f"{module}.weight"))
        bias = self.bias(module, (module,))
        return y if bias is None else add_bias(self.g, y, module, bias)

    def _carrier(self, module: str, weight: QuantizedWeight) -> Carrier:
        if self.static is not None and self.static.plan.applies_to(module):
            return static_carrier(weight.bits, weight.group_size)
        return dequantized_carrier(weight.bits, weight.group_size, weight.shape[0], self.precision(module))

    def precision(self, module: str) -> Activations:
        """With a static plan, the session quantizes nothing."""
        return super().precision(module) if self.static is None else "float32"

    @property
    def own_plan(self) -> ActivationPlan | None:
        return super().own_plan if self.static is None else self.static.plan

    @property
    def plan(self) -> ActivationPlan | None:
        return super().plan if self.static is None else self.static.plan

    def _embedding(self, ids: ir.Value) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
        """The embedded tokens, and the function that later turns the last hidden state into logits."""
        g, checkpoint, spec = self.g, self.checkpoint, self.checkpoint.spec
        if checkpoint.is_quantized(spec.embedding):
            table = checkpoint.quantized(spec.embedding)
            if not spec.tied_embeddings:
                self.table = (table.bits, 8)
                return quantized_embedding(g, ids, spec.embedding, table), lambda x: self.linear(x, spec.head)
            # Gather reads no type below a byte, and the table shall be stored once: 8 bits for both of its uses.
            chosen = self.carry(spec.head, table, carrier(8, table.group_size, self.precision(spec.head)))
            stored = store(g, spec.head, table, chosen)
            x = tied_embedding(g, ids, spec.embedding, stored)
            return x, lambda x: quantized_linear(g, x, spec.head, stored)
        x, source = float_embedding(g, ids, spec.embedding, self.parameter(f"{spec.embedding}.weight"))
        if spec.tied_embeddings:
            return x, lambda x: tied_float_head(g, x, spec.head, source)
        return x, lambda x: self.linear(x, spec.head)
