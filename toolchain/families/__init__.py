"""The families this tool serves. A new family is one file beside this one and one line in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boa_edge.errors import BoaEdgeError
from toolchain.families import gemma, llama, opt, phi3, qwen, smollm3
from toolchain.families.base import ROLES, AttentionSpec, DecoderSpec, Family, LayerNames, NormKind, Part
from toolchain.families.common import WRONG_VALUES, refusal
from toolchain.families.fields import check_fields

__all__ = [
    "FAMILIES",
    "ROLES",
    "AttentionSpec",
    "DecoderSpec",
    "Family",
    "LayerNames",
    "NormKind",
    "Part",
    "describe",
    "family_of",
]

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    qwen.FAMILY,
    smollm3.FAMILY,
    gemma.FAMILY,
    phi3.FAMILY,
    opt.FAMILY,
)

# What says in a config.json that there are experts, and that there is more than text.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")
_SENSES = ("vision_config", "audio_config", "image_token_index", "image_token_id", "text_config")


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a config.json. Raises BoaEdgeError for an architecture that nobody serves."""
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if model_type in family.model_types and all(name in family.architectures for name in architectures):
            return family
    accepted = f"Accepted architectures: {', '.join(sorted(n for family in FAMILIES for n in family.architectures))}"
    found = f"model_type {model_type!r}, architectures {architectures}"
    if any(config.get(key) for key in _EXPERTS) or "moe" in str(model_type).lower() or model_type == "mixtral":
        problem = (
            f"{found} is a mixture of experts, which is refused: an expert sees only the tokens that are sent to it, "
            "too few for its Hessians, and no runtime here runs one"
        )
        raise BoaEdgeError(problem, where=where, fix=f"Use a dense model. {accepted}")
    if any(config.get(key) is not None for key in _SENSES):
        problem = f"{found} is a multimodal model, which is refused: only text goes through this tool"
        fix = "Save its language model as a text-only one first (for Gemma 3: Gemma3ForCausalLM, gemma3_text)"
        raise BoaEdgeError(problem, where=where, fix=f"{fix}. {accepted}")
    raise BoaEdgeError(f"no adapter for {found}", where=where, fix=accepted)


def describe(config: Mapping[str, Any], where: object) -> DecoderSpec:
    """The DecoderSpec of a config.json.

    Raises:
        BoaEdgeError: of `where`, with the field: a value is impossible, or describes what nobody serves.
    """
    try:
        check_fields(config)
        return family_of(config, where).describe(config)
    except WRONG_VALUES as error:
        raise _placed(refusal(error), where) from None
    except BoaEdgeError as error:
        raise _placed(error, where) from None


def _placed(error: BoaEdgeError, where: object) -> BoaEdgeError:
    """The same error with the file's path: families call it `config.json`, wherever it is."""
    found = str(error.where)
    if not found.startswith("config.json"):
        return error
    return BoaEdgeError(error.what, where=f"{where}{found.removeprefix('config.json')}", fix=error.fix)
