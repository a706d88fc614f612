"""Decoders of a few thousand weights that keep the contract of the form `llm`, as ExecuTorch bundles on disk."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers the operators)
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackDynamicallyQuantizedPartitioner,
    XnnpackPartitioner,
)
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import Tensor, nn

VOCABULARY = 97
WIDTH = 64

_llama = torch.ops.llama
_decomposed = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    `masked`: a mask with a bias for distance in the place of `is_causal`. `ring`: a cache of so many rows, in which
    position p stands in row p modulo `ring`, and a window of what is left of it beside the longest prefill.
    """

    heads: int
    kv_heads: int
    head_size: int
    scale: float | None = None
    masked: bool = False
    ring: int | None = None


@dataclass(frozen=True)
class Shape:
    """A decoder. `quantized`: linears as int4 with int8 activations, which go to XNNPACK."""

    layers: tuple[Attention, ...]
    context: int
    prefill: int
    quantized: bool


# Groups of 1, 2 and 6 query heads; head sizes that are no multiple of a vector; several tiles of keys.
ATTENTION = Shape(
    layers=(
        Attention(4, 2, 16),
        Attention(6, 1, 24, scale=0.5),
        Attention(3, 3, 20, masked=True),
        Attention(4, 2, 16, ring=100),
    ),
    context=160,
    prefill=80,
    quantized=False,
)
QUANTIZED = Shape(layers=(Attention(9, 3, 32),), context=64, prefill=16, quantized=True)


class Int4Linear(nn.Module):
    """Random signed codes with a scale per 32 inputs; the input is quantized to int8 per token."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8))
        scales = (0.5 + torch.rand(outputs, inputs // 32)) / (4 * math.sqrt(inputs))
        self.register_buffer("scales", scales.bfloat16().float())
        self.register_buffer("zeros", torch.zeros(outputs, inputs // 32, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = _decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
        codes = _decomposed.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        x = _decomposed.dequantize_per_token(codes, scale, zero, -128, 127, torch.int8, torch.float32)
        weight = _decomposed.dequantize_per_channel_group(
            self.codes, self.scales, self.zeros, -8, 7, torch.int8, 32, torch.float32
        )
        return nn.functional.linear(x, weight)


class FloatLinear(nn.Module):
    """x W, as a product that no delegate takes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x[0], self.weight)[None]


class Layer(nn.Module):
    """Attention over the layer's own cache, then a mix of it with what came in."""

    def __init__(self, shape: Shape, attention: Attention) -> None:
        super().__init__()
        self.attention, self.context, self.prefill = attention, shape.context, shape.prefill
        heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_size
        linear = Int4Linear if shape.quantized else FloatLinear
        self.inward = linear(WIDTH, (heads + 2 * kv_heads) * size)
        self.outward = linear(heads * size, WIDTH)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, attention.ring or shape.context, kv_heads, size))

    def forward(self, x: Tensor, start: int) -> Tensor:
        a, count = self.attention, x.shape[1]
        parts = self.inward(x).view(1, count, a.heads + 2 * a.kv_heads, a.head_size)
        query, key, value = parts.split([a.heads, a.kv_heads, a.kv_heads], dim=2)
        mask = None
        for new, cache in ((key.contiguous(), self.keys), (value.contiguous(), self.values)):
            if a.ring is None:
                _llama.update_cache(new, cache, start)
            else:
                rows = torch.remainder(torch.arange(count) + start, a.ring)
                _llama.update_cache_with_indices(new, cache, 0, rows[None])
        if a.ring is not None:
            last = start + count - 1
            held = last - torch.remainder(last - torch.arange(a.ring), a.ring)
            distance = torch.arange(count)[:, None] + start - held[None]
            seen = (distance >= 0) & (distance <= a.ring - self.prefill) & (held >= 0)
            mask = torch.where(seen, 0.0, -torch.inf)
            start = 0
        elif a.masked:
            distance = torch.arange(count)[:, None] + start - torch.arange(self.context)[None]
            mask = torch.where(distance < 0, -torch.inf, -0.05 * distance.float())
        mixed = _llama.custom_sdpa(query.contiguous(), self.keys, self.values, start, mask, 0.0, mask is None, a.scale)
        return torch.tanh(x + 2 * self.outward(mixed.reshape(1, count, a.heads * a.head_size)))


class Decoder(nn.Module):
    """forward(tokens int64 [1, S], input_pos int64 [1]) -> logits float32 [1, VOCABULARY]"""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.context = shape.context
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(2 * shape.context, WIDTH)  # so that only the cache ends where it ends
        self.layers = nn.ModuleList(Layer(shape, attention) for attention in shape.layers)
        self.head = (Int4Linear if shape.quantized else FloatLinear)(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        start = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start < self.context)
        x = self.table(tokens) + self.positions(input_pos + torch.arange(tokens.shape[1]))[None]
        for layer in self.layers:
            x = layer(x, start)
        return self.head(4 * x[:, -1:])[:, 0]


def build_program(shape: Shape, seed: int = 3, **metadata: int) -> bytes:
    """The lowered program. `metadata` replaces what the constant methods say."""
    torch.manual_seed(seed)
    length = torch.export.Dim("length", min=1, max=shape.prefill)
    example = (torch.ones(1, 3, dtype=torch.int64), torch.tensor([0]))
    program = torch.export.export(
        Decoder(shape).eval(),
        example,
        dynamic_shapes=({1: length}, None),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    constants = {
        "get_max_seq_len": shape.prefill,
        "get_max_context_len": shape.context,
        "get_vocab_size": VOCABULARY,
        "use_kv_cache": True,
    }
    partitioners = [XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()] if shape.quantized else []
    edge = to_edge_transform_and_lower(
        program,
        partitioner=partitioners,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={**constants, **metadata},
    )
    lowered = edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
    return bytes(lowered.buffer)


def write_bundle(directory: Path, program: bytes, shape: Shape, **changes: object) -> Path:
    """The program, `runtime.json` and `manifest.json`, as `export` leaves them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.pte").write_bytes(program)
    runtime: dict[str, object] = {
        "schema_version": 1,
        "runtime": "executorch",
        "model": "model.pte",
        "form": "llm",
        "activations": "int8" if shape.quantized else "float32",
        "session_config": {},
        "context_length": shape.context,
        "prefill_length": shape.prefill,
        "eos_token_ids": [0],
        "bos_token_id": 1,
        "vocab_size": VOCABULARY,
        "layers": len(shape.layers),
        "kv_heads": shape.layers[0].kv_heads,
        "head_dim": shape.layers[0].head_size,
    }
    (directory / "runtime.json").write_text(json.dumps(runtime | changes), encoding="utf-8")
    files = {}
    for file in sorted(directory.iterdir()):
        if file.name != "manifest.json":
            content = file.read_bytes()
            files[file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "role": "runtime"}
    document = {"schema_version": 1, "created_by": {"test": "0"}, "recipe": {}, "files": files}
    (directory / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    return directory
