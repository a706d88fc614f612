"""The `fused` form: ONNX Runtime's own operators, as its official client for language models expects them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from exporters.onnx.rope import Rotation, Turn, paths, rotations, turn_of
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
        positions = self._positions(input_ids, at) if self._turns_outside or spec.position_table else None
        turns = self._turns(positions)
        x, head = self._embedding(input_ids)
        residual = _Residual(self.enter(x, positions))
        presents = []
        for layer in track(range(spec.layers), "writing layers"):
            turn = turns.get(turn_of(spec.attention[layer]))
            presents.append(self._layer(residual, layer, at, turn, pasts[layer]))
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
        rows = g.op("Concat", [asked, final], f"{path}/Concat", axis=1)
        y = head(self.online.at(rows, spec.head, "input", spec.hidden_size, path))
        first = g.constant([0], INT64)
        y = self.capped(y, path)
        logits = g.op("Slice", [y, last, end, axis], f"{path}/logits/Slice")
        g.output(logits, "logits", FLOAT, ["batch", 1, spec.vocab_size])
        every = g.op("Slice", [y, first, last, axis], f"{path}/{ALL_LOGITS}/Slice")
        g.output(every, ALL_LOGITS, FLOAT, ["batch", "positions", spec.vocab_size])

    @property
    def _turns_outside(self) -> bool:
        """Whether q and k are turned before attention, which can neither stop between its rotary embedding and its
        products nor turn a number of channels that 16 does not divide.
        """
        awkward = any(len(each.rope_inv_freq) % 8 for each in self.checkpoint.spec.attention)
        return awkward or self.online.any("query_key")

    def _positions(self, input_ids: ir.Value, at: Lengths) -> ir.Value:
        """int64 [batch, sequence]."""
        g = self.g
        size = g.op("Shape", [input_ids], "/positions/Shape")
        count = g.op("Gather", [size, g.constant(1, INT64)], "/positions/Gather")
        total = g.op("Cast", [at.total], "/positions/total/Cast", to=int(INT64))
        past = g.op("Sub", [total, count], "/positions/Sub")
        places = g.op("Range", [past, total, g.constant(1, INT64)], "/positions/Range")
        return g.op("Expand", [places, size], "/positions/Expand")

    def _turns(self, positions: ir.Value | None) -> Mapping[Turn, Tables | Rotation]:
        """By kind of turn: tables for attention, or cos and sin outside of it."""
        g, spec = self.g, self.checkpoint.spec
        if self._turns_outside:
            assert positions is not None
            return rotations(g, positions, spec)
        return {turn: tables(g, *turn, spec.max_positions, path) for turn, path in paths(spec).items()}

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
        if self.online.any("query_key") or isinstance(turn, Rotation) or names.head_norms():
            projected = self.heads(h, names, turn if isinstance(turn, Rotation) else None)
        else:
            projected = self._side_by_side(h, names)
        table = turn if isinstance(turn, Tables) else None
        scales = self.cache_scales(layer, by_channel=True)
        context, *present = group_query_attention(self.g, projected, past, at, table, spec, layer, path, scales)
        residual.pending = self.after(self.linear(context, names.o), names.attention_output_norm)
        h = self._norm(residual, names.mlp_norm)
        residual.pending = self.after(self.mlp(h, names), names.mlp_output_norm)
        return present[0], present[1]

    def activation(self, x: ir.Value, path: str) -> ir.Value:
        if self.checkpoint.spec.activation == "silu":
            return self.g.contrib("QuickGelu", [x], f"{path}/QuickGelu", alpha=1.0)
        return super().activation(x, path)

    def _norm(self, residual: _Residual, module: str) -> ir.Value:
        if residual.pending is None:
            return self.norm(residual.value, module)
        layer = self.checkpoint.spec.norm == "layer"
        weights = [self.g.floats(f"{module}.weight", self.norm_weight(module))]
        if layer:
            weights.append(self.g.floats(f"{module}.bias", self.parameter(f"{module}.bias")))
        kind = "SkipLayerNormalization" if layer else "SkipSimplifiedLayerNormalization"
        normed, residual.value = self.g.contribs(
            kind,
            [residual.value, residual.pending, *weights],
            f"{scope(module)}/{kind}",
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

    def _side_by_side(self, h: ir.Value, names: LayerNames) -> tuple[ir.Value, ...]:
        """q, k and v in one tensor where they have the same grid and precision, otherwise each by itself."""
        modules = (names.q, names.k, names.v)
        if len(set(modules)) == 1:  # stored side by side
            return (self.linear(h, names.q),)
        if not all(self.checkpoint.is_quantized(module) for module in modules):
            return self.projections(h, names, "q", "k", "v")
        weights = [self.checkpoint.quantized(module) for module in modules]
        grids = {(each.group_size, each.zero_points is None) for each in weights}
        ways = {self.carrier(module, weight) for module, weight in zip(modules, weights, strict=True)}
        precisions = {self.precision(module) for module in modules}
        if len(grids) > 1 or len(ways) > 1 or len(precisions) > 1 or not next(iter(ways)).fused:
            return self.projections(h, names, "q", "k", "v")
        name = f"{names.q.rpartition('.')[0]}.qkv_proj"
        for module, weight in zip(modules, weights, strict=True):
            self.carry(module, weight, *ways)
        return (self.product(h, name, modules, weights, self.bias(name, modules)),)

    def product(
        self, x: ir.Value, name: str, modules: Sequence[str], weights: Sequence[QuantizedWeight], bias: ir.Value | None
    ) -> ir.Value:
        """x times the weights of `modules` below each other, which are carried alike, as the linear `name`."""
        bits = self.carrier(modules[0], weights[0]).dtype.bitwidth
        stored = store_nbits(self.g, name, weights, bits)
        return nbits_linear(self.g, x, scope(name), stored, self.precision(modules[0]), bias)

    def linear(self, x: ir.Value, module: str) -> ir.Value:
        g = self.g
        bias = self.bias(module, (module,))
        if not self.checkpoint.is_quantized(module):
            y = float_linear(g, x, module, self.parameter(f"{module}.weight"))
            return y if bias is None else add_bias(g, y, module, bias)
        weight = self.checkpoint.quantized(module)
        way = self.carry(module, weight, self.carrier(module, weight))
        if way.fused:
            return self.product(x, module, (module,), (weight,), bias)
        y = quantized_linear(g, x, module, store(g, module, weight, way))
        return y if bias is None else add_bias(g, y, module, bias)

    def carrier(self, module: str, weight: QuantizedWeight) -> Carrier:
        """How the codes of a linear are carried."""
        return carrier(weight.bits, weight.group_size, self.precision(module))

    def _embedding(self, ids: ir.Value) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
        """The embedded tokens, and the function that later turns the last hidden state into logits."""
        g, checkpoint, spec = self.g, self.checkpoint, self.checkpoint.spec
        module, path = spec.embedding, scope(spec.embedding)
        if not checkpoint.is_quantized(module):
            x, source = float_embedding(g, ids, module, self.parameter(f"{module}.weight"))
            if spec.tied_embeddings:
                return x, lambda x: tied_float_head(g, x, spec.head, source)
            return x, lambda x: self.linear(x, spec.head)
        table = checkpoint.quantized(module)
        if not spec.tied_embeddings:
            # No product is computed with it, so it takes the fewest bits that a byte divides into.
            bits = {3: 4}.get(table.bits, table.bits)
            self.table = (table.bits, bits)
            return nbits_embedding(g, ids, path, store_nbits(g, module, [table], bits, table=True)), (
                lambda x: self.linear(x, spec.head)
            )
        way = self.carry(spec.head, table, self.carrier(spec.head, table))
        if not way.fused:
            plain = store(g, spec.head, table, way)
            return tied_embedding(g, ids, module, plain), lambda x: quantized_linear(g, x, spec.head, plain)
        stored = store_nbits(g, spec.head, [table], way.dtype.bitwidth)
        x = nbits_embedding(g, ids, path, as_table(g, module, stored))
        return x, lambda x: nbits_linear(g, x, scope(spec.head), stored, self.precision(spec.head))
