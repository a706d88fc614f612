"""A decoder of a few thousand weights that keeps the graph contract of docs/contracts.md, as a bundle on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from boa_edge import __version__

VOCABULARY = 97
CONTEXT = 64
WIDTH = 16
KV_HEADS = 2
HEAD = 4
HEADS = 4
LAYERS = 2


class _Graph:
    """Collects nodes and constants, naming values after what made them."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: NDArray[np.generic] | list[int] | int | float, kind: type = np.int64) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=kind), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self._random.normal(0, 0.5, shape), np.float32)

    def heads(self, value: str, heads: int) -> str:
        """[batch, sequence, heads * head] as [batch, heads, sequence, head]."""
        split = self.add("Reshape", value, self.constant([0, 0, heads, HEAD]))
        return self.add("Transpose", split, perm=[0, 2, 1, 3])


def build_model(seed: int = 7) -> onnx.ModelProto:
    """The graph. Ids, positions, grouped queries, causality and the cache all matter to the result."""
    graph = _Graph(seed)
    size = lambda name, axis: graph.add("Gather", graph.add("Shape", name), graph.constant(axis))  # noqa: E731
    count, total = size("input_ids", 1), size("attention_mask", 1)
    table = graph.weight(VOCABULARY, WIDTH)
    hidden = graph.add(
        "Add",
        graph.add("Gather", table, "input_ids"),
        graph.add("Gather", graph.weight(CONTEXT, WIDTH), "position_ids"),
    )
    one = graph.constant(1)
    rows = graph.add("Range", graph.add("Sub", total, count), total, one)
    columns = graph.add("Range", graph.constant(0), total, one)
    causal = graph.add("LessOrEqual", columns, graph.add("Unsqueeze", rows, graph.constant([1])))
    present = graph.add("Cast", "attention_mask", to=TensorProto.BOOL)
    allowed = graph.add("And", causal, graph.add("Unsqueeze", present, graph.constant([1, 2])))
    bias = graph.add("Where", allowed, graph.constant(0.0, np.float32), graph.constant(-1e9, np.float32))
    outputs = []
    for layer in range(LAYERS):
        cache = []
        for kind in ("key", "value"):
            new = graph.heads(graph.add("MatMul", hidden, graph.weight(WIDTH, KV_HEADS * HEAD)), KV_HEADS)
            name = f"present.{layer}.{kind}"
            past = f"past_key_values.{layer}.{kind}"
            graph.nodes.append(helper.make_node("Concat", [past, new], [name], name=name, axis=2))
            outputs.append(name)
            cache.append(name)
        query = graph.heads(graph.add("MatMul", hidden, graph.weight(WIDTH, HEADS * HEAD)), HEADS)
        keys, values = (_repeat(graph, name) for name in cache)
        scores = graph.add("MatMul", query, graph.add("Transpose", keys, perm=[0, 1, 3, 2]))
        mixed = graph.add("MatMul", graph.add("Softmax", graph.add("Add", scores, bias), axis=-1), values)
        joined = graph.add("Reshape", graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), graph.constant([0, 0, WIDTH]))
        hidden = graph.add("Tanh", graph.add("Add", hidden, graph.add("MatMul", joined, graph.weight(WIDTH, WIDTH))))
    head = graph.add("Transpose", table, perm=[1, 0])
    graph.nodes.append(helper.make_node("MatMul", [hidden, head], ["logits"], name="logits"))
    return _assemble(graph, outputs)


def _repeat(graph: _Graph, cache: str) -> str:
    """[batch, kv_heads, n, head] as [batch, heads, n, head]: every kv head serves neighbouring query heads."""
    wide = graph.add("Unsqueeze", cache, graph.constant([2]))
    both = graph.add("Concat", *([wide] * (HEADS // KV_HEADS)), axis=2)
    return graph.add("Reshape", both, graph.constant([0, HEADS, -1, HEAD]))


def _assemble(graph: _Graph, outputs: list[str]) -> onnx.ModelProto:
    ids = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]),
    ]
    past = [
        helper.make_tensor_value_info(
            name.replace("present", "past_key_values"), TensorProto.FLOAT, ["batch", KV_HEADS, "past", HEAD]
        )
        for name in outputs
    ]
    results = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY])]
    results += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", KV_HEADS, "total", HEAD]) for name in outputs
    ]
    body = helper.make_graph(graph.nodes, "tiny", [*ids, *past], results, graph.constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def write_bundle(directory: Path, model: onnx.ModelProto | None = None, *, external: bool = False) -> Path:
    """The model, `runtime.json` and `manifest.json`, as `export` leaves them."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.onnx"
    onnx.save(
        model or build_model(), path, save_as_external_data=external, location="model.onnx.data", size_threshold=256
    )
    runtime = {
        "schema_version": 1,
        "runtime": "onnx",
        "model": "model.onnx",
        "activations": "float32",
        "session_config": {"session.disable_prepacking": "0"},
        "context_length": CONTEXT,
        "eos_token_ids": [0],
        "bos_token_id": 1,
        "vocab_size": VOCABULARY,
        "layers": LAYERS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD,
    }
    (directory / "runtime.json").write_text(json.dumps(runtime), encoding="utf-8")
    files = {}
    for file in sorted(directory.iterdir()):
        if file.name != "manifest.json":
            content = file.read_bytes()
            files[file.name] = {
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "role": "runtime",
            }
    document = {"schema_version": 1, "created_by": {"boa-edge": __version__}, "recipe": {}, "files": files}
    (directory / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    return directory
