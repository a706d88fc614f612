"""The `fused` form: ONNX Runtime's own operators, as its official client for language models expects them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from boa_edge.progress import track
from exporters.onnx.decoder import FLOAT, INT64, DecoderBuilder
from exporters.onnx.embedding import float_embedding, tied_embedding, tied_float_head
from exporters.onnx.gqa import Lengths, Tables, group_query_attention, lengths, tables
from exporters.onnx.graph import scope
from exporters.onnx.kernels import Carrier, carrier
from exporters.onnx.linears import add_bias, float_linear, quantized_linear, store
from exporters.onnx.nbits import as_table, nbits_embedding, nbits_linear, store_nbits
from exporters.onnx.rope import Rotation, rotate, rotation
from exporters.onnx.session import ALL_LOGITS, LOGITS_START
from toolchain.families import LayerNames
from toolchain.quantized import QuantizedWeight

_END = 2**63 - 1


@dataclass
class _Residual:
    """The residual stream: `value`, to which `pending` is to be added by the norm that comes next."""

    value: ir.Value
    pending: ir.Value | None = None


@dataclass
class FusedDecoder(DecoderBuilder):
    """Writes q, k and v as one matrix, attention with its rotary embedding and cache as one node, each sum of the
    residual stream with the norm behind it as one node, and the logits of the last position unless asked for more.
    """

    def build(self) -> None:
        g, spec = self.g, self.checkpoint.spec
        input_ids = g.input("input_ids", INT64, ["batch", "sequence"])
        attention_mask = g.input("attention_mask", INT64, ["batch", "total"])
        cache: list[int | str] = ["batch", spec.kv_heads, "past", spec.head_dim]
        pasts = self.cache_inputs(cache)
        start = g.optional_input(LOGITS_START, [_END])
        at = lengths(g, attention_mask)
        turns = self._turns(input_ids, at)
        x, head = self._embedding(input_ids)
        if spec.embedding_scale != 1.0:
            x = g.op("Mul", [x, g.constant(spec.embedding_scale, FLOAT)], f"{scope(spec.embedding)}/scale/Mul")
        x = self.online.at(x, spec.embedding, "output", spec.hidden_size, scope(spec.embedding))
        residual = _Residual(x)
        presents = []
        for layer in track(range(spec.layers), "writing layers"):
            presents.append(self._layer(residual, layer, at, turns[layer], pasts[layer]))
        self._logits(self._last_norm(residual), start, head)
        self.cache_outputs(presents, ["batch", spec.kv_heads, "present", spec.head_dim])

    def _logits(self, x: ir.Value, start: ir.Value, head: Callable[[ir.Value], ir.Value]) -> None:
        """The last position's logits, and those from `start` on, by one head that packs its weights once.

        An output of its own for the former, since the official client makes room for as many positions as tokens unless
        the graph says that there is one.
        """
        g, spec = self.g, self.checkpoint.spec
        path = f"{scope(spec.head)}/rows"
        end, axis, last = (g.constant([value], INT64) for value in (_END, 1, -1))
        asked = g.op("Slice", [x, start, end, axis], f"{path}/asked/Slice")
        final = g.op("Slice", [x, last, end, axis], f"{path}/last/Slice")
        y = head(g.op("Concat", [asked, final], f"{path}/Concat", axis=1))
        first = g.constant([0], INT64)
        if spec.logit_softcap is not None:
            cap = g.constant(spec.logit_softcap, FLOAT)
            y = g.op("Tanh", [g.op("Div", [y, cap], f"{path}/softcap/Div")], f"{path}/softcap/Tanh")
            y = g.op("Mul", [y, cap], f"{path}/softcap/Mul")
        logits = g.op("Slice", [y, last, end, axis], f"{path}/logits/Slice")
        g.output(logits, "logits", FLOAT, ["batch", 1, spec.vocab_size])
        every = g.op("Slice", [y, first, last, axis], f"{path}/{ALL_LOGITS}/Slice")
        g.output(every, ALL_LOGITS, FLOAT, ["batch", "positions", spec.vocab_size])

    def _turns(self, input_ids: ir.Value, at: Lengths) -> list[Tables | Rotation | None]:
        """By layer: tables for attention; cos and sin outside of it, where q and k owe a product after they are turned;
        or nothing, where they are not turned."""
        g, spec = self.g, self.checkpoint.spec
        if not self.online.any("query_key"):
            kinds = dict.fromkeys((each.rope_inv_freq, each.rope_scaling) for each in spec.attention)
            made = {
                kind: tables(g, *kind, spec.max_positions, f"/rope/{index}") if kind[0] else None
                for index, kind in enumerate(kinds)
            }
            return [made[each.rope_inv_freq, each.rope_scaling] for each in spec.attention]
        size = g.op("Shape", [input_ids], "/rope/Shape")
        count = g.op("Gather", [size, g.constant(1, INT64)], "/rope/Gather")
        total = g.op("Cast", [at.total], "/rope/total/Cast", to=int(INT64))
        past = g.op("Sub", [total, count], "/rope/Sub")
        positions = g.op("Range", [past, total, g.constant(1, INT64)], "/rope/Range")
        return [rotation(g, g.op("Expand", [positions, size], "/rope/Expand"), spec)] * spec.layers

    def _layer(
        self,
        residual: _Residual,
        layer: int,
        at: Lengths,
        turn: Tables | Rotation | None,
        past: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, ir.Value]:
        spec = self.checkpoint.spec
        names = spec.layer_names[layer]
        h = self._norm(residual, names.attention_norm)
        path = scope(names.q).rpartition("/")[0]
        projected = self._attended(h, names, turn)
        table = None if isinstance(turn, Rotation) else turn
        context, *present = group_query_attention(self.g, projected, past, at, table, spec, layer, path)
        residual.pending = self._after(self._linear(context, names.o), names.attention_output_norm)
        h = self._norm(residual, names.mlp_norm)
        residual.pending = self._after(self._mlp(h, names), names.mlp_output_norm)
        return present[0], present[1]

    def _mlp(self, h: ir.Value, names: LayerNames) -> ir.Value:
        g, spec = self.g, self.checkpoint.spec
        assert names.gate is not None
        path = scope(names.gate).rpartition("/")[0]
        if names.gate == names.up:
            sizes = g.constant([spec.intermediate_size] * 2, INT64)
            gate, up = g.ops("Split", [self._linear(h, names.up), sizes], f"{path}/Split", 2, axis=2)
        else:
            gate, up = self._linear(h, names.gate), self._linear(h, names.up)
        if spec.activation == "silu":
            gate = g.contrib("QuickGelu", [gate], f"{path}/silu/QuickGelu", alpha=1.0)
        else:
            gate = g.op("Gelu", [gate], f"{path}/Gelu", approximate="tanh")
        product = g.op("Mul", [gate, up], f"{path}/Mul")
        product = self.online.at(product, names.down, "input", spec.intermediate_size, scope(names.down))
        return self._linear(product, names.down)

    def _after(self, y: ir.Value, module: str | None) -> ir.Value:
        return y if module is None else self.norm(y, module)

    def _attended(
        self, h: ir.Value, names: LayerNames, turn: Tables | Rotation | None
    ) -> tuple[ir.Value] | tuple[ir.Value, ir.Value, ir.Value]:
        """q, k and v as attention takes them: side by side, unless something comes between, on the heads of q and k."""
        spec = self.checkpoint.spec
        if not isinstance(turn, Rotation) and not names.head_norms():
            return self._projections(h, names)
        q, k, v = (self._linear(h, name) for name in (names.q, names.k, names.v))
        if names.q_norm is not None:
            q = self._head_norm(q, names.q_norm, spec.heads)
        if names.k_norm is not None:
            k = self._head_norm(k, names.k_norm, spec.kv_heads)
        if isinstance(turn, Rotation):
            q, k = self._turned(q, names.q, spec.heads, turn), self._turned(k, names.k, spec.kv_heads, turn)
        return q, k, v

    def _head_norm(self, x: ir.Value, module: str, heads: int) -> ir.Value:
        """Each head of q or k by itself. Attention's own inputs for the weights are not served by the CPU provider."""
        g, size = self.g, self.checkpoint.spec.head_dim
        split = g.op("Reshape", [x, g.constant([0, 0, heads, size], INT64)], f"{scope(module)}/Reshape")
        whole = g.constant([0, 0, heads * size], INT64)
        return g.op("Reshape", [self.norm(split, module), whole], f"{scope(module)}/ReshapeBack")

    def _turned(self, x: ir.Value, module: str, heads: int, turn: Rotation) -> ir.Value:
        """q or k float32 [batch, sequence, heads * head_dim], turned by its positions and then by what it owes."""
        x = rotate(self.g, x, turn, heads, scope(module))
        attention = module.rpartition(".")[0]
        return self.online.at(x, attention, "query_key", heads * self.checkpoint.spec.head_dim, scope(module))

    def _norm(self, residual: _Residual, module: str) -> ir.Value:
        if residual.pending is None:
            return self.norm(residual.value, module)
        scale = self.g.floats(f"{module}.weight", self.norm_weight(module))
        normed, residual.value = self.g.contribs(
            "SkipSimplifiedLayerNormalization",
            [residual.value, residual.pending, scale],
            f"{scope(module)}/SkipSimplifiedLayerNormalization",
            (0, 3),
            epsilon=self.checkpoint.spec.norm_eps,
        )
        residual.pending = None
        return normed

    def _last_norm(self, residual: _Residual) -> ir.Value:
        g, spec = self.g, self.checkpoint.spec
        if not self.online.any("input", spec.final_norm):
            return self._norm(residual, spec.final_norm)
        assert residual.pending is not None
        x = g.op("Add", [residual.value, residual.pending], f"{scope(spec.final_norm)}/residual/Add")
        x = self.online.at(x, spec.final_norm, "input", spec.hidden_size, scope(spec.final_norm))
        return self.norm(x, spec.final_norm)

    def _projections(self, h: ir.Value, names: LayerNames) -> tuple[ir.Value] | tuple[ir.Value, ir.Value, ir.Value]:
        """q, k and v, side by side in one tensor where they have the same grid and precision."""
        modules = (names.q, names.k, names.v)
        if len(set(modules)) == 1:  # stored side by side
            return (self._linear(h, names.q),)
        if not all(self.checkpoint.is_quantized(module) for module in modules):
            return self._linear(h, names.q), self._linear(h, names.k), self._linear(h, names.v)
        weights = [self.checkpoint.quantized(module) for module in modules]
        grids = {(each.group_size, each.zero_points is None) for each in weights}
        ways = {self._carrier(module, weight) for module, weight in zip(modules, weights, strict=True)}
        precisions = {self.precision(module) for module in modules}
        if len(grids) > 1 or len(ways) > 1 or len(precisions) > 1 or not next(iter(ways)).fused:
            return self._linear(h, names.q), self._linear(h, names.k), self._linear(h, names.v)
        way = next(iter(ways))
        name = f"{names.q.rpartition('.')[0]}.qkv_proj"
        self.linears.update(dict.fromkeys(modules, way))
        stored = store_nbits(self.g, name, weights, way.dtype.bitwidth)
        bias = self.bias(name, modules)
        return (nbits_linear(self.g, h, scope(name), stored, self.precision(names.q), bias),)

    def _linear(self, x: ir.Value, module: str) -> ir.Value:
        g = self.g
        bias = self.bias(module, (module,))
        if not self.checkpoint.is_quantized(module):
            y = float_linear(g, x, module, self.parameter(f"{module}.weight"))
            return y if bias is None else add_bias(g, y, module, bias)
        weight = self.checkpoint.quantized(module)
        way = self.linears[module] = self._carrier(module, weight)
        if way.fused:
            stored = store_nbits(g, module, [weight], way.dtype.bitwidth)
            return nbits_linear(g, x, scope(module), stored, self.precision(module), bias)
        y = quantized_linear(g, x, module, store(g, module, weight, way))
        return y if bias is None else add_bias(g, y, module, bias)

    def _carrier(self, module: str, weight: QuantizedWeight) -> Carrier:
        return carrier(weight.bits, weight.group_size, self.precision(module))

    def _embedding(self, ids: ir.Value) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
        """The embedded tokens, and the function that later turns the last hidden state into logits."""
        g, checkpoint, spec = self.g, self.checkpoint, self.checkpoint.spec
        module, path = spec.embedding, scope(spec.embedding)
        if not checkpoint.is_quantized(module):
            x, source = float_embedding(g, ids, module, self.parameter(f"{module}.weight"))
            if spec.tied_embeddings:
                return x, lambda x: tied_float_head(g, x, spec.head, source)
            return x, lambda x: self._linear(x, spec.head)
        table = checkpoint.quantized(module)
        if not spec.tied_embeddings:
            # No product is computed with it, so it takes the fewest bits that a byte divides into.
            bits = {3: 4}.get(table.bits, table.bits)
            return nbits_embedding(g, ids, path, store_nbits(g, module, [table], bits, table=True)), (
                lambda x: self._linear(x, spec.head)
            )
        way = self.linears[spec.head] = self._carrier(spec.head, table)
        if not way.fused:
            plain = store(g, spec.head, table, way)
            return tied_embedding(g, ids, module, plain), lambda x: quantized_linear(g, x, spec.head, plain)
        stored = store_nbits(g, spec.head, [table], way.dtype.bitwidth)
        x = nbits_embedding(g, ids, path, as_table(g, module, stored))
        return x, lambda x: nbits_linear(g, x, scope(spec.head), stored, self.precision(spec.head))
