"""The forms of one decoder: the same codes in other graphs. A new one is one file with a builder and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exporters.base import Activations
from exporters.bundle import Form, RuntimeConfig
from exporters.onnx.decoder import DecoderBuilder
from exporters.onnx.fused import FusedDecoder
from exporters.onnx.fused_int8 import FusedInt8Decoder
from exporters.onnx.genai import write_genai_config
from exporters.onnx.kernels import per_node_config, session_config
from exporters.onnx.qdq import QdqDecoder
from toolchain.checkpoint import Checkpoint


@dataclass(frozen=True)
class FormOf:
    """One line of FORMS.

    Attributes:
        decoder: writes the graph.
        session_config: the runtime's session options, by the precision of the activations.
        companions: writes further files into the bundle.
    """

    decoder: type[DecoderBuilder]
    session_config: Callable[[Activations], dict[str, str]]
    companions: Callable[[Checkpoint, Path, RuntimeConfig], None] = lambda checkpoint, directory, runtime: None


FORMS: dict[Form, FormOf] = {
    "qdq": FormOf(QdqDecoder, session_config),
    "fused": FormOf(FusedDecoder, per_node_config, write_genai_config),
    "fused-int8": FormOf(FusedInt8Decoder, per_node_config, write_genai_config),
}
