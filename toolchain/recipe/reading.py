"""A recipe by its name or from a YAML file, and what is wrong with one that cannot be read."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from boa_edge.errors import UsageError
from toolchain.methods import METHODS
from toolchain.options import Options
from toolchain.recipe.fields import (
    ACTIVATION_LETTERS,
    CACHE_LETTERS,
    ActivationChoice,
    CacheChoice,
    CalibrationSize,
    EmbeddingFormat,
    LearningChoice,
    Recipe,
    WeightFormat,
)

_NAME = re.compile(
    r"w(?:(?P<bits>\d+)|mix(?P<budget>\d+(?:\.\d+)?)mb)"
    r"(?:g(?P<group>\d+))?(?P<asym>asym)?(?P<a8>a8[a-z]?)?(?P<kv8>kv8[a-z]?)?-(?P<method>[a-z]+)(?P<rest>(?:-.*)?)"
)
_GRAMMAR = (
    "w<bits>[g<group>][asym][a8[t|r|s|u]][kv8[t]]-<method>[-<transform>...], such as w4g32-edge, w3asym-gptq or "
    "w4g32a8-edge-smooth (int8 activations: a8 per block, a8t per token, a8r per row, a8s and a8u static; int8 keys "
    "and values: kv8 per head, kv8t per token); "
    "wmix<megabytes>mb in place of w<bits> fits a budget"
)


def load_recipe(recipe: str) -> Recipe:
    """A recipe by name, or from a YAML file.

    Raises:
        UsageError: an unknown name, key or value, with what is accepted.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _from_file(path)
    match = _NAME.fullmatch(recipe)
    if match is None:
        raise UsageError(f"unknown recipe {recipe!r}", fix=f"A recipe is a YAML file or a name: {_GRAMMAR}")
    weights = {
        "bits": int(match["bits"]) if match["bits"] else "auto",
        "budget_mb": float(match["budget"]) if match["budget"] else None,
        "group_size": int(match["group"]) if match["group"] else None,
        "symmetric": match["asym"] is None,
    }
    document: dict[str, Any] = {"method": match["method"], "weights": weights}
    for field, told, letters in (
        ("activations", match["a8"], ACTIVATION_LETTERS),
        ("kv_cache", match["kv8"], CACHE_LETTERS),
    ):
        if told:
            prefix, _, letter = told.rpartition("8")
            schemes = {own: scheme for scheme, own in letters.items()}
            if letter not in schemes:
                known = ", ".join(f"{prefix}8{own} ({scheme})" for own, scheme in schemes.items())
                raise UsageError(f"unknown recipe {recipe!r}: there is no {told!r}", fix=f"There are: {known}")
            document[field] = {"scheme": schemes[letter]}
    if match["rest"]:
        document["transforms"] = match["rest"][1:].split("-")
    return parse_recipe(document, f"recipe {recipe!r}")


class _TwiceError(yaml.YAMLError):
    """A key comes twice in a mapping."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, to which a key that comes twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _TwiceError(f"key {key.value!r} comes twice, the second time on line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return node


def _from_file(path: Path) -> Recipe:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UsageError("no such recipe file", where=path) from None
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror})", where=path) from None
    except _TwiceError as error:
        raise UsageError(str(error), where=path, fix="Remove one of them") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not valid YAML ({' '.join(str(error).split())})", where=path) from None
    if not isinstance(document, dict):
        raise UsageError("is not a recipe: a mapping of fields is expected", where=path)
    return parse_recipe(document, path)


def parse_recipe(document: dict[str, Any], where: object) -> Recipe:
    """Validate a mapping. What is the method's own anyway counts as left to it: another one would have its own.

    Raises:
        UsageError: naming the field, what was found and what is accepted.
    """
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise UsageError(_explain(error), where=where) from None
    method = METHODS[recipe.method]
    search = None if recipe.scale_search == method.default_search else recipe.scale_search
    solver = None if recipe.solver == method.options else recipe.solver
    return recipe.model_copy(update={"scale_search": search, "solver": solver})


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _fields_beside(problem["loc"])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"accepted: {', '.join(known)}"
            lines.append(f"unknown key {field!r}, {hint}")
        elif problem["type"] == "missing":
            accepted = f", accepted: {', '.join(METHODS)}" if field == "method" else ""
            lines.append(f"{field} is missing{accepted}")
        else:
            message = _in_terms_of_yaml(problem)
            lines.append(f"{field}: {message}, found {problem['input']!r}" if field else message)
    return "; ".join(lines)


def _in_terms_of_yaml(problem: ErrorDetails) -> str:
    """A message of pydantic's, less its words for Python's types."""
    if problem["type"] == "tuple_type":
        return "Input should be a list"
    if problem["type"] in ("model_type", "dict_type", "model_attributes_type"):
        known = _fields_beside((*problem["loc"], "")) if problem["loc"] else list(Recipe.model_fields)
        return f"Input should be a mapping of {', '.join(known)}"
    return problem["msg"].removeprefix("Value error, ")


def _fields_beside(location: tuple[int | str, ...]) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        "weights": WeightFormat,
        "embedding": EmbeddingFormat,
        "activations": ActivationChoice,
        "kv_cache": CacheChoice,
        "solver": Options,
        "learning": LearningChoice,
        "calibration": CalibrationSize,
    }
    parent = models.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
    return list(parent.model_fields)
