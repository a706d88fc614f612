"""ExecuTorch: one checkpoint, the same codes in a .pte whose linears, norms and RoPE run in XNNPACK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from boa_edge.files import write_json
from exporters.base import Decoder, Exporter, Lowered, Request
from exporters.bundle import LOWERING, RUNTIME, SCHEMA_VERSION, Bundle, RuntimeConfig, token_ids
from exporters.executorch.foresight import foresee
from exporters.executorch.lowerable import check, lengths, schemes
from toolchain.checkpoint import Checkpoint

MODEL = "model.pte"


def lower(checkpoint: Checkpoint, directory: Path, request: Request) -> Lowered:
    """Write `model.pte`, `lowering.json` and `runtime.json`, and prove that the program loads and runs.

    Raises:
        BoaEdgeError: the checkpoint is broken, or the program fails a check.
    """
    # Here, since an export to another runtime should not wait for ExecuTorch's modules.
    from exporters.executorch.lowering import write_decoder
    from exporters.executorch.verify import verify

    spec = checkpoint.spec
    bound = lengths(spec, request)
    ends, begin = token_ids(checkpoint)
    runtime = RuntimeConfig(
        schema_version=SCHEMA_VERSION,
        runtime="executorch",
        model=MODEL,
        form="llm",
        activations=request.activations,
        session_config={},
        context_length=bound.context,
        eos_token_ids=ends,
        bos_token_id=begin,
        vocab_size=spec.vocab_size,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        prefill_length=bound.prefill,
    )
    model = directory / MODEL
    lowering = write_decoder(checkpoint, bound, request.activations, metadata(runtime), model)
    verify(model, runtime, model.stat().st_size, checkpoint)
    write_json(directory / RUNTIME, runtime.model_dump(mode="json"))
    write_json(directory / LOWERING, lowering.document())
    notes = (*_notes(checkpoint, request, len(lowering.float_linears)), f"{lowering.summary()} ({LOWERING} lists all)")
    return Lowered(lowering.quantized_linears, lowering.weight_bytes, notes)


def metadata(runtime: RuntimeConfig) -> dict[str, Any]:
    """The constant methods that ExecuTorch's own runner asks a program for."""
    found: dict[str, Any] = {
        "get_max_seq_len": runtime.prefill_length,
        "get_max_context_len": runtime.context_length,
        "get_vocab_size": runtime.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": runtime.prefill_length != 1,
    }
    # Without them the runner takes the tokenizer's.
    if runtime.bos_token_id is not None:
        found["get_bos_id"] = runtime.bos_token_id
    if runtime.eos_token_ids:
        found["get_eos_ids"] = list(runtime.eos_token_ids)
    return found


def _notes(checkpoint: Checkpoint, request: Request, kept: int) -> list[str]:
    notes = []
    plan = checkpoint.activations
    if plan is not None and plan.format.scheme != "per_token" and request.activations == "int8":
        notes.append(
            f"the checkpoint was made for activations {plan.format.scheme}; XNNPACK quantizes them per token, "
            "so its figures differ from the recorded ones (recipes with a8t in place of a8 are made for that)"
        )
    found = [("the linears", scheme.bits) for _, scheme in schemes(checkpoint)]
    if checkpoint.is_quantized(checkpoint.spec.embedding):
        found.append(("the embedding table", checkpoint.quantized(checkpoint.spec.embedding).bits))
    notes += [
        f"{bits}-bit codes of {what} are carried in 4 bits: the file is not smaller than at 4 bits"
        for what, bits in dict.fromkeys(found)
        if bits < 4
    ]
    if kept:
        notes.append(
            f"{kept} linears keep float32 inputs, for which XNNPACK has no weights in groups: they stand "
            "dequantized, at eight times the size of 4-bit ones"
        )
    return notes


def open_bundle(bundle: Bundle) -> Decoder:
    """The bundle's program on the host. Raises what `ExecutorchDecoder.open` raises."""
    from exporters.executorch.session import ExecutorchDecoder

    return ExecutorchDecoder.open(bundle)


EXPORTER = Exporter(
    foresee=foresee,
    check=check,
    lower=lower,
    forms=("llm",),
    open=open_bundle,
    lengths=True,
    recipe="w4g32a8t-edge-smooth-rotatetable",
)
