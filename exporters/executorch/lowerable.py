"""What ExecuTorch's XNNPACK delegate cannot hold, known from the checkpoint before any work."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from boa_edge.errors import BoaEdgeError, UsageError
from exporters.base import Activations, Request
from toolchain.checkpoint import ACTIVATIONS, KV_CACHE, Checkpoint
from toolchain.families import DecoderSpec
from toolchain.quantized import QuantizedWeight

GROUP = 32
_VERSIONS = ("1.5.1",)
_LONGEST_CONTEXT, _PREFILL = 2048, 128
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu", "relu")


@dataclass(frozen=True)
class Lengths:
    """In tokens: how many the cache holds, and how many one call takes at most."""

    context: int
    prefill: int


@dataclass(frozen=True)
class Scheme:
    """The grid of one quantized linear, as config.json tells it."""

    bits: int
    group_size: int | None
    symmetric: bool


def check_family(spec: DecoderSpec, where: object) -> None:
    """UsageError for a decoder that the program would compute as something else."""
    if spec.activation not in _ACTIVATIONS:
        problem = f"ExecuTorch export has no activation {spec.activation!r}"
        raise UsageError(problem, where=where, fix=f"Accepted: {', '.join(_ACTIVATIONS)}")


def lengths(spec: DecoderSpec, request: Request) -> Lengths:
    """The lengths that are asked for, or the defaults: context 2048 or the model's, prefill 128.

    Raises:
        UsageError: lengths that the model or the cache has no room for.
    """
    context = min(spec.max_positions, _LONGEST_CONTEXT) if request.context_length is None else request.context_length
    prefill = min(context, _PREFILL) if request.prefill_length is None else request.prefill_length
    if not 0 < context <= spec.max_positions:
        fix = f"The model reads 1 to {spec.max_positions} tokens"
        raise UsageError(f"a context of {context} tokens", where="--context", fix=fix)
    if not 0 < prefill <= context:
        fix = f"1 to {context} tokens fit the context"
        raise UsageError(f"a prefill of {prefill} tokens", where="--prefill", fix=fix)
    return Lengths(context, prefill)


def schemes(checkpoint: Checkpoint) -> Iterator[tuple[str, Scheme]]:
    """Every quantized linear with its grid, without reading the weights; not the embedding table."""
    spec = checkpoint.spec
    groups = checkpoint.config["quantization_config"]["config_groups"].values()
    for module in dict.fromkeys([*spec.linear_inputs(), spec.head]):
        if (module == spec.head and spec.tied_embeddings) or not checkpoint.is_quantized(module):
            continue
        for group in groups:
            if any(re.match(target.removeprefix("re:"), module) for target in group["targets"]):
                weights = group["weights"]
                yield module, Scheme(weights["num_bits"], weights["group_size"], weights["symmetric"])
                break


def check(checkpoint: Checkpoint, request: Request) -> None:
    """Refuse what the program could not hold, or would silently compute as something else.

    Raises:
        BoaEdgeError, UsageError: with what is accepted.
    """
    if (version := importlib.metadata.version("executorch")) not in _VERSIONS:
        # Delegates are written in its schema, which it may change.
        known = ", ".join(_VERSIONS)
        raise BoaEdgeError(
            f"ExecuTorch {version} is installed; programs are written for {known}", fix="Run `make setup`"
        )
    spec = checkpoint.spec
    config = checkpoint.path / "config.json"
    check_family(spec, config)
    lengths(spec, request)
    if checkpoint.kv_cache is not None:
        raise BoaEdgeError(
            "ExecuTorch export keeps keys and values in float32, and this checkpoint asks for an int8 cache",
            where=checkpoint.path / KV_CACHE,
            fix="Quantize with a recipe without kv_cache",
        )
    plan = checkpoint.activations
    if plan is not None and plan.format.scheme.startswith("static") and request.activations == "int8":
        raise BoaEdgeError(
            f"the activations are {plan.format.scheme}, for which XNNPACK has no kernel with int4 weights",
            where=checkpoint.path / ACTIVATIONS,
            fix="Quantize with activations of scheme per_token",
        )
    _check_weights(checkpoint, config, request.activations)
    _check_table(checkpoint, request.activations)


def _check_weights(checkpoint: Checkpoint, config: Path, activations: Activations) -> None:
    widths = checkpoint.spec.linear_inputs()
    for module, scheme in schemes(checkpoint):
        where = f"{checkpoint.path / 'model.safetensors'}: {module}"
        if not scheme.symmetric and _has_zero_points(checkpoint.quantized(module)):
            raise BoaEdgeError(
                "has zero points, and XNNPACK ignores those of weights without a word",
                where=where,
                fix="Quantize with symmetric weights (a recipe without asym)",
            )
        width = widths.get(module, checkpoint.spec.hidden_size)
        if scheme.bits != 8 and width % 2:
            raise BoaEdgeError(
                f"{module}: {width} inputs, and XNNPACK takes codes of fewer than 8 bits in pairs",
                where=config,
                fix="Quantize with 8-bit weights",
            )
        if scheme.group_size is None:
            continue
        if scheme.bits == 8:
            raise BoaEdgeError(
                f"{module}: 8-bit weights in groups of {scheme.group_size}, which XNNPACK does not have",
                where=config,
                fix="Quantize 8-bit linears with one scale per output channel (group_size: null)",
            )
        if activations == "float32":
            raise _no_float_inputs(module, config)
        if scheme.group_size % GROUP:
            raise BoaEdgeError(
                f"{module}: groups of {scheme.group_size}; XNNPACK takes multiples of {GROUP}",
                where=config,
                fix=f"Quantize with a group size of {GROUP}, or per output channel",
            )
        _check_scales(checkpoint.tensor(f"{module}.weight_scale"), where)


def _check_table(checkpoint: Checkpoint, activations: Activations) -> None:
    spec = checkpoint.spec
    if not checkpoint.is_quantized(spec.embedding):
        return
    table = checkpoint.quantized(spec.embedding)
    where = checkpoint.path / "embedding.safetensors"
    if _has_zero_points(table):
        fix = "Quantize with a symmetric table"
        raise BoaEdgeError("has zero points, which the program has no place for", where=where, fix=fix)
    if table.bits != 8 and table.shape[1] % 2:
        fix = "Quantize the table to 8 bits"
        raise BoaEdgeError(f"rows of {table.shape[1]} codes do not fill bytes", where=where, fix=fix)
    if not spec.tied_embeddings or table.group_size is None:
        return
    if table.bits == 8:
        raise BoaEdgeError(
            f"the head is an 8-bit table in groups of {table.group_size}, which XNNPACK does not have",
            where=where,
            fix="Quantize with one scale per row: in the recipe, embedding: {bits: 8, group_size: null}",
        )
    if activations == "float32":
        raise _no_float_inputs("the head", where)
    if table.group_size % GROUP:
        fix = f"In the recipe, embedding: {{bits: {table.bits}, group_size: {GROUP}}}, or null for one scale per row"
        problem = f"the head is a table in groups of {table.group_size}; XNNPACK takes multiples of {GROUP}"
        raise BoaEdgeError(problem, where=where, fix=fix)
    _check_scales(table.scales, str(where))


def _no_float_inputs(what: str, where: Path) -> BoaEdgeError:
    return BoaEdgeError(
        f"{what}: weights in groups, for which XNNPACK takes int8 inputs only",
        where=where,
        fix="Export without --activations float32, or quantize with one scale per output channel",
    )


def _has_zero_points(weight: QuantizedWeight) -> bool:
    return weight.zero_points is not None and bool(weight.zero_points.any())


def _check_scales(scales: torch.Tensor, where: str) -> None:
    if not torch.equal(scales.to(torch.bfloat16).to(scales.dtype), scales):
        raise BoaEdgeError(
            "has scales that bfloat16 does not hold exactly, and XNNPACK keeps those of groups in bfloat16",
            where=where,
            fix="Quantize with round_scales: true, which solves the codes for rounded scales",
        )
