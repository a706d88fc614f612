"""Whether `runtime.json` says of a graph what the graph is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime

from boa_edge.errors import BoaEdgeError
from exporters.bundle import RUNTIME, RuntimeConfig

_POSITIONS = "position_ids"  # of the form qdq alone
_CACHE = "past_key_values."


def check_settings(session: onnxruntime.InferenceSession, runtime: RuntimeConfig, model: Path) -> None:
    """Raises BoaEdgeError naming the field that contradicts the graph's inputs and outputs."""
    for field, said, found in _contradictions(session, runtime):
        problem = f"{field} is {said}, but {model.name} has {found}"
        raise BoaEdgeError(problem, where=model.with_name(RUNTIME), fix="Export the bundle again")


def _contradictions(
    session: onnxruntime.InferenceSession, runtime: RuntimeConfig
) -> Iterator[tuple[str, object, object]]:
    shapes = {each.name: each.shape for each in session.get_inputs()}
    forms = ("qdq",) if _POSITIONS in shapes else ("fused", "fused-int8")
    if runtime.form not in forms:
        yield "form", repr(runtime.form), f"the inputs of {' or '.join(map(repr, forms))}"
    layers = sum(name.startswith(_CACHE) for name in shapes) // 2
    if runtime.layers != layers or f"{_CACHE}{layers - 1}.key" not in shapes:
        yield "layers", runtime.layers, f"a cache of {layers}"
    cache = shapes.get(f"{_CACHE}0.key", [None] * 4)
    for field, said, place in (("kv_heads", runtime.kv_heads, 1), ("head_dim", runtime.head_dim, 3)):
        if cache[place] != said:
            yield field, said, cache[place]
    vocabulary = next((each.shape[-1] for each in session.get_outputs() if each.name == "logits"), None)
    if vocabulary != runtime.vocab_size:
        yield "vocab_size", runtime.vocab_size, vocabulary
