"""The families this tool serves. A new family is one file beside this one and one line in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boa_edge.errors import BoaEdgeError
from toolchain.families import llama
from toolchain.families.base import ROLES, DecoderSpec, Family, LayerNames, Part

__all__ = ["FAMILIES", "ROLES", "DecoderSpec", "Family", "LayerNames", "Part", "describe", "family_of"]

FAMILIES: tuple[Family, ...] = (llama.FAMILY,)


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a config.json. Raises BoaEdgeError for an architecture that nobody serves."""
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if model_type in family.model_types and all(name in family.architectures for name in architectures):
            return family
    accepted = sorted(name for family in FAMILIES for name in family.architectures)
    found = f"model_type {model_type!r}, architectures {architectures}"
    raise BoaEdgeError(f"no adapter for {found}", where=where, fix=f"Accepted architectures: {', '.join(accepted)}")


def describe(config: Mapping[str, Any], where: object) -> DecoderSpec:
    """The DecoderSpec of a config.json."""
    return family_of(config, where).describe(config)
