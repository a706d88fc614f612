"""ONNX: one checkpoint, the same codes in the graph that FORMS names."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import cast

import onnx_ir as ir
from safetensors import safe_open

from boa_edge.errors import BoaEdgeError
from boa_edge.files import write_json
from exporters.base import Exporter, Lowered, Request
from exporters.bundle import KERNELS, RUNTIME, SCHEMA_VERSION, Form, RuntimeConfig, token_ids
from exporters.onnx.foresight import foresee
from exporters.onnx.forms import FORMS
from exporters.onnx.graph import GraphBuilder
from exporters.onnx.kernels import as_planned
from exporters.onnx.lowerable import Asked, Grid, Place, refusals
from exporters.onnx.notes import notes_of
from exporters.onnx.session import OnnxDecoder
from exporters.onnx.static import static_plan
from exporters.onnx.verify import verify
from exporters.onnx.weights import WeightFile
from toolchain.checkpoint import ACTIVATIONS, KV_CACHE, Checkpoint

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"

_OPSET = 23
_OPSET_INT2 = 25

_EMBEDDING = "embedding.safetensors"
_WHERE: dict[Place, str] = {"activations": ACTIVATIONS, "kv_cache": KV_CACHE, "embedding": _EMBEDDING}


def _groups(checkpoint: Checkpoint) -> list[tuple[Grid, int | None]]:
    """(what, group size) of every kind of quantized weight, without reading the weights."""
    found: list[tuple[Grid, int | None]] = []
    for group in checkpoint.config["quantization_config"]["config_groups"].values():
        heads = [bool(re.match(target.removeprefix("re:"), checkpoint.spec.head)) for target in group["targets"]]
        for grid, there in (("weights", not all(heads)), ("head", any(heads))):
            if there:
                found.append((cast(Grid, grid), group["weights"]["group_size"]))
    path = checkpoint.path / _EMBEDDING
    if path.exists():
        with safe_open(path, framework="np") as tensors:
            metadata = tensors.metadata()
        found.append(("embedding", int(metadata["group_size"]) or None))
    return found


def check(checkpoint: Checkpoint, request: Request) -> None:
    """Refuse decoders that the graph cannot hold, and group sizes that ONNX Runtime does not fuse: they would run some
    20 times slower.

    Raises:
        BoaEdgeError: with what is accepted.
    """
    plan, cache = checkpoint.activations, checkpoint.kv_cache
    asked = Asked(
        form=cast(Form, request.form),
        activations=request.activations,
        groups=_groups(checkpoint),
        scheme=None if plan is None else plan.format.scheme,
        cache=None if cache is None else cache.scheme,
        spec=checkpoint.spec,
    )
    for refusal in refusals(asked):
        where = checkpoint.path / _WHERE.get(refusal.place, "config.json")
        raise BoaEdgeError(refusal.problem, where=where, fix=refusal.fix)


def lower(checkpoint: Checkpoint, directory: Path, request: Request) -> Lowered:
    """Write `model.onnx`, `model.onnx.data`, `runtime.json` and `kernels.json`, and prove that they load and run.

    Raises:
        BoaEdgeError: the checkpoint is broken, or the graph fails a check.
    """
    spec, activations, plan = checkpoint.spec, request.activations, checkpoint.activations
    name = cast(Form, request.form)
    chosen = FORMS[name]
    ends, begin = token_ids(checkpoint)
    # What the graph rounds by itself the session shall not round once more.
    static = static_plan(checkpoint, activations) is not None
    runtime = RuntimeConfig(
        schema_version=SCHEMA_VERSION,
        runtime="onnx",
        model=MODEL,
        form=name,
        activations=activations,
        session_config=as_planned(
            chosen.session_config("float32" if static else activations), None if plan is None else plan.format.scheme
        ),
        context_length=spec.max_positions,
        eos_token_ids=ends,
        bos_token_id=begin,
        vocab_size=spec.vocab_size,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
    )
    with WeightFile(directory / WEIGHTS) as weights:
        graph = GraphBuilder(weights, _OPSET)
        decoder = chosen.decoder(graph, checkpoint, activations)
        decoder.build()
    if name == "qdq" and any(each.carrier.dtype == ir.DataType.INT2 for each in decoder.linears.values()):
        graph.opset = _OPSET_INT2
    graph.save(directory / MODEL, importlib.metadata.version("boa-edge"))
    ran = verify(directory / MODEL, runtime, decoder, weights.size)
    if ran is not None:
        write_json(directory / KERNELS, ran.document())
    write_json(directory / RUNTIME, runtime.model_dump(mode="json"))
    chosen.companions(checkpoint, directory, runtime)
    notes = (*notes_of(checkpoint, activations, name, decoder, ran), *decoder.notes)
    return Lowered(len(decoder.linears), weights.size, notes)


EXPORTER = Exporter(foresee=foresee, check=check, lower=lower, forms=tuple(FORMS), open=OnnxDecoder.open)
