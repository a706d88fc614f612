"""Whether the files of a quantized checkpoint are all there and fit each other, before anything is done with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError
from toolchain.families import DecoderSpec
from toolchain.quantized import SUPPORTED_BITS

ACTIVATIONS = "activations.json"
EMBEDDING = "embedding.safetensors"
GENERATION = "generation_config.json"
KV_CACHE = "kv_cache.json"
TRANSFORMS = "transforms.json"

Schemes = list[tuple[list[re.Pattern[str]], dict[str, Any]]]

_AGAIN = "Quantize the model again"
# What a field of recipe.yaml has had written.
_WRITTEN = {"kv_cache": KV_CACHE, "activations": ACTIVATIONS, "embedding": EMBEDDING, "transforms": TRANSFORMS}


def check_files(directory: Path, recipe: Mapping[str, Any], *, rotated: bool) -> None:
    """Raises BoaEdgeError for a file that the recipe, or a `rotated` model, must have: without it the checkpoint would
    be another one.
    """
    asked = {name: f"recipe.yaml asks for {field}" for field, name in _WRITTEN.items() if recipe.get(field)}
    if rotated:
        asked[TRANSFORMS] = "config.json says that the model is rotated"
    for name, reason in asked.items():
        if not (directory / name).is_file():
            fix = f"Copy the checkpoint again with all its files, or {_AGAIN[0].lower()}{_AGAIN[1:]}"
            raise BoaEdgeError(f"is missing, and {reason}", where=directory / name, fix=fix)


def read_schemes(quantization: Mapping[str, Any], config: Path) -> Schemes:
    """Patterns of modules, and the grid of their weights, as `quantization_config` has them.

    Raises:
        BoaEdgeError: naming the field that is missing or wrong.
    """
    place = f"{config}: quantization_config.config_groups"
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict):
        raise _wrong(place, groups, "a mapping of groups")
    found: Schemes = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise _wrong(f"{place}.{name}", group, "a mapping with targets and weights")
        targets, weights = group.get("targets"), group.get("weights")
        if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
            raise _wrong(f"{place}.{name}.targets", targets, "a list of names or of patterns re:...")
        if not isinstance(weights, dict):
            raise _wrong(f"{place}.{name}.weights", weights, "a mapping with num_bits, group_size and symmetric")
        for field, fits, wanted in _rules(weights):
            if not fits:
                raise _wrong(f"{place}.{name}.weights.{field}", weights.get(field), wanted)
        try:
            found.append(([re.compile(target.removeprefix("re:")) for target in targets], weights))
        except re.error as error:
            raise _wrong(f"{place}.{name}.targets", f"a pattern that cannot be read: {error}", "patterns") from None
    return found


def check_tensors(shapes: Mapping[str, tuple[int, ...]], spec: DecoderSpec, schemes: Schemes, directory: Path) -> None:
    """Every parameter is there in the shape that the configuration gives it, and all codes have a grid.

    Args:
        shapes: of what `model.safetensors` holds; of codes, as `NAME.weight`, the shape of the weight.

    Raises:
        BoaEdgeError: naming the tensor or the module.
    """
    where = directory / "model.safetensors"
    for name, expected in _expected(spec):
        found = shapes.get(name)
        if found is None:
            raise BoaEdgeError(f"has no tensor {name!r}", where=where, fix=_AGAIN)
        if found != expected:
            problem = f"has shape {list(found)}, and config.json gives it {list(expected)}"
            raise BoaEdgeError(problem, where=f"{where}: {name}", fix=_AGAIN)
    for name in shapes:
        module, _, part = name.rpartition(".")
        if part == "weight_packed" and not any(each.match(module) for patterns, _ in schemes for each in patterns):
            place = f"{directory / 'config.json'}: quantization_config.config_groups"
            raise BoaEdgeError(f"no group has the target {module}, whose codes are there", where=place, fix=_AGAIN)


def check_token_ids(settings: Any, path: Path) -> None:
    """Raises BoaEdgeError where generation_config.json or config.json names the ends of a text by anything but ids."""
    if not isinstance(settings, dict):
        raise BoaEdgeError("is not a mapping of settings", where=path, fix="Copy it from the model again")
    ends, begin = settings.get("eos_token_id"), settings.get("bos_token_id")
    if not (ends is None or _is_id(ends) or (isinstance(ends, list) and all(map(_is_id, ends)))):
        raise _wrong(f"{path}: eos_token_id", ends, "a token's number, a list of such, or null", "Correct the field")
    if not (begin is None or _is_id(begin)):
        raise _wrong(f"{path}: bos_token_id", begin, "a token's number or null", "Correct the field")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rules(weights: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """Field, whether its value fits, and what is accepted."""
    bits, size, symmetric = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric")
    accepted = ", ".join(map(str, SUPPORTED_BITS))
    yield "num_bits", type(bits) is int and bits in SUPPORTED_BITS, accepted
    grouped = size is None or (type(size) is int and size > 0)
    yield "group_size", "group_size" in weights and grouped, "a number of inputs per scale, or null"
    yield "symmetric", isinstance(symmetric, bool), "true or false"


def _wrong(where: str, found: Any, wanted: str, fix: str = _AGAIN) -> BoaEdgeError:
    said = "is missing or null" if found is None else f"is {str(found)[:80]!r}"
    return BoaEdgeError(f"{said}; accepted: {wanted}", where=where, fix=fix)


def _expected(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of what every checkpoint of a decoder has."""
    yield f"{spec.embedding}.weight", (spec.vocab_size, spec.hidden_size)
    if not spec.tied_embeddings:
        yield f"{spec.head}.weight", (spec.vocab_size, spec.hidden_size)
    widths = spec.linear_inputs()
    norms = {spec.final_norm: spec.hidden_size}
    for names in spec.layer_names:
        rows: dict[str, int] = {}
        for role, part in names.parts().items():
            heads = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}.get(role)
            inner = spec.intermediate_size if role in ("gate", "up") else spec.hidden_size
            rows[part.module] = rows.get(part.module, 0) + (inner if heads is None else heads * spec.head_dim)
        for module, height in rows.items():
            yield f"{module}.weight", (height, widths[module])
        for role, part in names.parts().items():
            if role in spec.biases:
                yield f"{part.module}.bias", (rows[part.module],)
        norms |= dict.fromkeys(names.norms(), spec.hidden_size)
        norms |= dict.fromkeys(names.head_norms().values(), spec.head_dim)
    for module, width in norms.items():
        yield f"{module}.weight", (width,)
        if spec.norm == "layer":
            yield f"{module}.bias", (width,)
