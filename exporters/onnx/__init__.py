"""ONNX: one checkpoint, the same codes in the graph that FORMS names."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import cast

import onnx_ir as ir
from safetensors import safe_open

from boa_edge.errors import BoaEdgeError
from boa_edge.files import write_json
from exporters.base import Activations, Exporter, Lowered, Request
from exporters.bundle import RUNTIME, SCHEMA_VERSION, Form, RuntimeConfig, token_ids
from exporters.onnx.foresight import foresee
from exporters.onnx.forms import FORMS
from exporters.onnx.graph import GraphBuilder
from exporters.onnx.kernels import FUSED_GROUPS, carrier
from exporters.onnx.lowerable import ACCEPTED, obstacles
from exporters.onnx.session import OnnxDecoder
from exporters.onnx.verify import verify
from exporters.onnx.weights import WeightFile
from toolchain.checkpoint import ACTIVATIONS, KV_CACHE, Checkpoint
from toolchain.transforms import online_products

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"

_OPSET = 23
_OPSET_INT2 = 25


def _schemes(checkpoint: Checkpoint) -> list[tuple[str, int, int | None]]:
    """(what, bits, group size) of every kind of quantized weight, without reading the weights."""
    groups = checkpoint.config["quantization_config"]["config_groups"].values()
    found = [("the linears", g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups if g["targets"]]
    path = checkpoint.path / "embedding.safetensors"
    if path.exists():
        with safe_open(path, framework="np") as tensors:
            metadata = tensors.metadata()
        found.append(("the embedding table", int(metadata["bits"]), int(metadata["group_size"]) or None))
    return found


def check(checkpoint: Checkpoint, request: Request) -> None:
    """Refuse decoders that the graph cannot hold, and group sizes that ONNX Runtime does not fuse: they would run some
    20 times slower.

    Raises:
        BoaEdgeError: with what is accepted.
    """
    activations, name = request.activations, cast(Form, request.form)
    # A product between rotary embedding and attention takes the former out of the latter, and with it what it can do.
    products = online_products(checkpoint.spec, checkpoint.transforms)
    takes = "qdq" if any(product.place == "query_key" for product in products) else name
    if found := obstacles(checkpoint.spec, takes):
        raise BoaEdgeError(
            f"ONNX export of the family {checkpoint.spec.family!r} is not there yet, for want of: {', '.join(found)}",
            where=checkpoint.path / "config.json",
            fix=f"Accepted: {ACCEPTED[name]}",
        )
    if checkpoint.kv_cache is not None:
        raise BoaEdgeError(
            "ONNX export keeps keys and values in float32, and this checkpoint asks for an int8 cache",
            where=checkpoint.path / KV_CACHE,
            fix="Quantize with a recipe without kv_cache",
        )
    plan = checkpoint.activations
    if plan is not None and plan.format.scheme.startswith("static") and activations == "int8":
        raise BoaEdgeError(
            f"the activations are {plan.format.scheme}, for which ONNX Runtime's CPU has no kernel with int4 weights: "
            "it would dequantize both at each call",
            where=checkpoint.path / ACTIVATIONS,
            fix="Quantize with activations of scheme per_block, or export with --activations float32",
        )
    for what, _, group_size in _schemes(checkpoint):
        if group_size is not None and group_size not in FUSED_GROUPS:
            sizes = ", ".join(str(size) for size in FUSED_GROUPS)
            raise BoaEdgeError(
                f"{what} are in groups of {group_size}, for which ONNX Runtime has no fast kernel",
                where=checkpoint.path / "config.json",
                fix=f"Quantize with a group size of {sizes}, or per output channel",
            )


def _notes(checkpoint: Checkpoint, activations: Activations, form: Form) -> tuple[str, ...]:
    notes = []
    plan = checkpoint.activations
    if plan is not None and plan.format.scheme in ("per_token", "per_row") and activations == "int8":
        notes.append(
            f"the checkpoint was made for activations {plan.format.scheme}; ONNX Runtime quantizes them per block, "
            "so its figures differ from the recorded ones"
        )
    for what, bits, group_size in _schemes(checkpoint):
        chosen = carrier(bits, group_size, activations)
        if what == "the embedding table" and form == "qdq":
            chosen = carrier(8, group_size, activations)
        if chosen.dtype.bitwidth > bits:
            notes.append(
                f"{bits}-bit codes of {what} are carried in {chosen.dtype.bitwidth} bits: "
                f"the file is not smaller than at {chosen.dtype.bitwidth} bits"
            )
        if not chosen.fused:
            notes.append(
                f"{what}: 8-bit codes with float32 activations have no fast fused kernel; the runtime dequantizes them "
                "at each call, which takes time and the memory of the float weights"
            )
    return tuple(dict.fromkeys(notes))


def lower(checkpoint: Checkpoint, directory: Path, request: Request) -> Lowered:
    """Write `model.onnx`, `model.onnx.data` and `runtime.json`, and prove that they load and run.

    Raises:
        BoaEdgeError: the checkpoint is broken, or the graph fails a check.
    """
    spec, activations = checkpoint.spec, request.activations
    name = cast(Form, request.form)
    chosen = FORMS[name]
    ends, begin = token_ids(checkpoint)
    runtime = RuntimeConfig(
        schema_version=SCHEMA_VERSION,
        runtime="onnx",
        model=MODEL,
        form=name,
        activations=activations,
        session_config=chosen.session_config(activations),
        context_length=spec.max_positions,
        eos_token_ids=ends,
        bos_token_id=begin,
        vocab_size=spec.vocab_size,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
    )
    dtypes = {carrier(bits, group_size, activations).dtype for _, bits, group_size in _schemes(checkpoint)}
    opset = _OPSET_INT2 if ir.DataType.INT2 in dtypes and name == "qdq" else _OPSET
    with WeightFile(directory / WEIGHTS) as weights:
        graph = GraphBuilder(weights, opset)
        decoder = chosen.decoder(graph, checkpoint, activations)
        decoder.build()
    graph.save(directory / MODEL, importlib.metadata.version("boa-edge"))
    verify(directory / MODEL, runtime, weights.size)
    write_json(directory / RUNTIME, runtime.model_dump(mode="json"))
    chosen.companions(checkpoint, directory, runtime)
    return Lowered(len(decoder.linears), weights.size, _notes(checkpoint, activations, name))


EXPORTER = Exporter(foresee=foresee, check=check, lower=lower, forms=tuple(FORMS), open=OnnxDecoder.open)
