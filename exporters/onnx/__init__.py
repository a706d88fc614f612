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
from exporters.bundle import KERNELS, RUNTIME, SCHEMA_VERSION, Form, RuntimeConfig, token_ids
from exporters.onnx.foresight import foresee
from exporters.onnx.forms import FORMS
from exporters.onnx.graph import GraphBuilder
from exporters.onnx.kernels import as_planned, carrier
from exporters.onnx.lowerable import Asked, Grid, Place, in_words, refusals
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


# Of schemes with one scale per row, what ONNX Runtime does instead.
_ROWS = {
    "per_token": "the checkpoint was made for activations per_token; ONNX Runtime quantizes them per block, so its "
    "figures differ from the recorded ones",
    "per_row": "activations are per_row where ARM's KleidiAI kernels run, which this bundle leaves switched on; "
    "elsewhere ONNX Runtime quantizes them per block, so that figures differ from the recorded ones",
}


def _schemes(checkpoint: Checkpoint) -> list[tuple[Grid, int, int | None]]:
    """(what, bits, group size) of every kind of quantized weight, without reading the weights."""
    groups = checkpoint.config["quantization_config"]["config_groups"].values()
    found: list[tuple[Grid, int, int | None]] = [
        ("weights", g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups if g["targets"]
    ]
    path = checkpoint.path / _EMBEDDING
    if path.exists():
        with safe_open(path, framework="np") as tensors:
            metadata = tensors.metadata()
        found.append(("embedding", int(metadata["bits"]), int(metadata["group_size"]) or None))
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
        groups=[(grid, group_size) for grid, _, group_size in _schemes(checkpoint)],
        scheme=None if plan is None else plan.format.scheme,
        cache=None if cache is None else cache.scheme,
        spec=checkpoint.spec,
    )
    for refusal in refusals(asked):
        where = checkpoint.path / _WHERE.get(refusal.place, "config.json")
        raise BoaEdgeError(refusal.problem, where=where, fix=refusal.fix)


def _notes(checkpoint: Checkpoint, activations: Activations, form: Form) -> tuple[str, ...]:
    notes = []
    plan = checkpoint.activations
    if plan is not None and plan.format.scheme in _ROWS and activations == "int8" and form != "fused-int8":
        notes.append(_ROWS[plan.format.scheme])
    static = static_plan(checkpoint, activations)
    if static is not None:
        notes.append(
            f"activations are {static.format.scheme}, for NPUs: ONNX Runtime's CPU has no kernel for them and "
            "multiplies in float32 what it has rounded"
        )
    for grid, bits, group_size in _schemes(checkpoint):
        what = in_words(grid)
        chosen = carrier(bits, group_size, activations)
        if grid == "embedding" and form == "qdq":
            chosen = carrier(8, group_size, activations)
        if grid == "weights" and form == "fused-int8":
            chosen = carrier(max(bits, 4), group_size, activations)
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
    if checkpoint.kv_cache is not None and form != "qdq":
        notes.append(
            "an int8 cache takes a quarter of the memory, but ONNX Runtime's attention over it has no fast kernel for "
            "several tokens at once: prompts are read more slowly (docs/onnx.md)"
        )
    return tuple(dict.fromkeys(notes))


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
    dtypes = {carrier(bits, group_size, activations).dtype for _, bits, group_size in _schemes(checkpoint)}
    opset = _OPSET_INT2 if ir.DataType.INT2 in dtypes and name == "qdq" else _OPSET
    with WeightFile(directory / WEIGHTS) as weights:
        graph = GraphBuilder(weights, opset)
        decoder = chosen.decoder(graph, checkpoint, activations)
        decoder.build()
    graph.save(directory / MODEL, importlib.metadata.version("boa-edge"))
    ran = verify(directory / MODEL, runtime, weights.size, rounds=static)
    if ran is not None:
        write_json(directory / KERNELS, ran.document())
    write_json(directory / RUNTIME, runtime.model_dump(mode="json"))
    chosen.companions(checkpoint, directory, runtime)
    notes = (*_notes(checkpoint, activations, name), *decoder.notes)
    return Lowered(len(decoder.linears), weights.size, notes)


EXPORTER = Exporter(foresee=foresee, check=check, lower=lower, forms=tuple(FORMS), open=OnnxDecoder.open)
