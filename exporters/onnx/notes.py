"""What the user should know of a graph: files that are not smaller, slow kernels, figures that no longer hold."""

from __future__ import annotations

from collections.abc import Iterator

from exporters.base import Activations
from exporters.bundle import Form
from exporters.onnx.decoder import DecoderBuilder
from exporters.onnx.graph import scope
from exporters.onnx.lowerable import in_words
from exporters.onnx.ran import Ran
from exporters.onnx.static import static_plan
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import Checkpoint

# Of schemes with one scale per row, what ONNX Runtime does instead.
_ROWS = {
    "per_token": "the checkpoint was made for activations per_token; ONNX Runtime quantizes them per block, so its "
    "figures differ from the recorded ones",
    "per_row": "activations are per_row where ARM's KleidiAI kernels run, which this bundle leaves switched on; "
    "elsewhere ONNX Runtime quantizes them per block, so that figures differ from the recorded ones",
}
_INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger")


def notes_of(
    checkpoint: Checkpoint, activations: Activations, form: Form, written: DecoderBuilder, ran: Ran | None
) -> Iterator[str]:
    """One line each.

    Args:
        written: what has built the graph.
        ran: which kernels ran; None where it was not run.
    """
    plan = checkpoint.activations
    scheme = None if plan is None else plan.format.scheme
    if activations == "int8" and form == "fused-int8" and scheme not in (None, "float"):
        keeps = " (--form fused keeps them)" if scheme == "per_block" else ""
        yield (
            f"the checkpoint was made for activations {scheme}; the form fused-int8 quantizes them with one symmetric "
            f"scale per row, so its figures differ from the recorded ones{keeps}"
        )
    elif activations == "int8" and scheme in _ROWS:
        yield _ROWS[scheme]
    static = static_plan(checkpoint, activations)
    if static is not None:
        yield from _of_static(static, ran)
    yield from _of_widths(checkpoint, written)
    codes = "8-bit codes with float32 activations" if static is None else "codes behind static activations"
    yield from _of_dequantized(checkpoint, written, ran, codes)
    if checkpoint.kv_cache is not None and form != "qdq":
        yield (
            "an int8 cache takes a quarter of the memory, but ONNX Runtime's attention over it has no fast kernel for "
            "several tokens at once: prompts are read more slowly (docs/onnx.md)"
        )


def _of_static(plan: ActivationPlan, ran: Ran | None) -> Iterator[str]:
    count = sum(plan.applies_to(module) for module in plan.group_sizes)
    integer = {} if ran is None else {name: ran.kernels[name] for name in _INTEGER_PRODUCTS if name in ran.kernels}
    does = "multiplies in float32 what it has rounded"
    if integer:
        names = ", ".join(integer)
        does = f"multiplies {sum(integer.values())} of {count} linears as integers ({names}), the others in float32"
    elif ran is None:
        does += " (8-bit weights per output channel in part as integers)"
    yield f"activations are {plan.format.scheme}, for NPUs: ONNX Runtime's CPU rounds them and {does}"


def _what(module: str, checkpoint: Checkpoint) -> str:
    spec = checkpoint.spec
    if module == spec.head:
        return in_words("embedding" if spec.tied_embeddings else "head")
    return in_words("weights")


def _of_widths(checkpoint: Checkpoint, written: DecoderBuilder) -> Iterator[str]:
    held = written.linears.items()
    widths = [(_what(module, checkpoint), each.bits, each.carrier.dtype.bitwidth) for module, each in held]
    if written.table is not None:
        widths.append((in_words("embedding"), *written.table))
    wider = [each for each in widths if each[2] > each[1]]
    for name, bits, width in dict.fromkeys(wider):
        total, count = (sum(each[:2] == (name, bits) for each in among) for among in (widths, wider))
        which = name if count == total else f"some of {name} ({count} of {total})"
        yield f"{bits}-bit codes of {which} are carried in {width} bits: the file is not smaller than at {width} bits"


def _of_dequantized(checkpoint: Checkpoint, written: DecoderBuilder, ran: Ran | None, codes: str) -> Iterator[str]:
    products = () if ran is None else ran.float_products
    # What should have become one kernel, and has not, counts too.
    slow = [
        _what(module, checkpoint)
        for module, each in written.linears.items()
        if not each.carrier.fused or f"{scope(module)}/MatMul" in products
    ]
    every = [_what(module, checkpoint) for module in written.linears]
    for name in dict.fromkeys(slow):
        which = f"the products with {name}" if name == in_words("embedding") else name
        if slow.count(name) < every.count(name):
            which = f"some of {name} ({slow.count(name)} of {every.count(name)})"
        yield (
            f"{which}: {codes} have no fast fused kernel; the runtime dequantizes them at each call, which takes time "
            "and the memory of the float weights"
        )
