"""A checkpoint -> a .pte, and what the program runs where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boa_edge.progress import say, track
from exporters.base import Activations
from exporters.executorch.constants import Constants
from exporters.executorch.decoder import DecoderProgram
from exporters.executorch.lowerable import Lengths
from exporters.executorch.program import BACKEND, write_program
from exporters.executorch.segments import Segments
from toolchain.checkpoint import Checkpoint


@dataclass(frozen=True)
class Lowering:
    """What stands in a program.

    Attributes:
        delegates: how many of XNNPACK.
        delegated, outside: operators inside and outside of them, by name, with how often they stand there.
        quantized_linears: how many stand as integer codes, the head among them.
        float_linears: modules whose codes stand dequantized.
        weight_bytes: bytes of every weight as stored.
    """

    delegates: int
    delegated: Mapping[str, int]
    outside: Mapping[str, int]
    quantized_linears: int
    float_linears: tuple[str, ...]
    weight_bytes: int

    def document(self) -> dict[str, Any]:
        """`lowering.json` (docs/contracts.md)."""
        return {
            "schema_version": 1,
            "backend": BACKEND,
            "delegates": self.delegates,
            "delegated": dict(self.delegated),
            "outside": dict(self.outside),
            "quantized_linears": self.quantized_linears,
            "float_linears": list(self.float_linears),
        }

    def summary(self) -> str:
        """One line."""
        inside, outside = sum(self.delegated.values()), sum(self.outside.values())
        attention = sum(count for name, count in self.outside.items() if name.startswith("llama::"))
        return (
            f"{inside} operators run in {self.delegates} XNNPACK delegates, {outside} outside of them, "
            f"{attention} of these attention and its cache"
        )


def write_decoder(
    checkpoint: Checkpoint, lengths: Lengths, activations: Activations, metadata: Mapping[str, Any], path: Path
) -> Lowering:
    """Write the program of a decoder that `lowerable.check` has let pass.

    Args:
        metadata: constant methods by name.

    Raises:
        BoaEdgeError: the checkpoint is broken.
    """
    constants = Constants()
    segments = Segments(checkpoint, constants, activations)
    operators: Counter[str] = Counter()
    delegates, changed = [], False
    for index in track(range(checkpoint.spec.layers + 1), "writing delegates"):
        delegate = segments.build(index, lengths)
        changed = changed or (index == 0 and len(delegate.outputs) > 3)
        operators += delegate.operators
        delegates.append(delegate.serialize())
    say("writing the program")
    decoder = DecoderProgram(checkpoint, lengths, changed)
    written = write_program(decoder, decoder.example(), decoder.sizes(), delegates, constants, path, metadata)
    return Lowering(
        delegates=len(delegates),
        delegated=dict(sorted(operators.items())),
        outside=written.outside,
        quantized_linears=len(segments.linears),
        float_linears=tuple(sorted(segments.kept)),
        weight_bytes=constants.size + decoder.table_bytes - written.shared,
    )
