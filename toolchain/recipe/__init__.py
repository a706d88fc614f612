"""Recipes: what to do to a model, as frozen, validated data; by name or from a YAML file.

A name reads as what it does:

    w<bits>[g<group>][asym][a8[t|r|s|u]][kv8[t]]-<method>[-<transform>...]

    w4g32-edge    4-bit weights, symmetric, one scale per 32 inputs, solved by BoA with all that measured better
    w3asym-gptq   3-bit weights, asymmetric, one scale per output channel, solved by GPTQ
    w2asym-rtn    2-bit weights, asymmetric, per output channel, rounded to nearest
    w4g32a8-edge-smooth    4-bit weights in groups of 32 and int8 activations, after SmoothQuant
    w4g32a8t-edge-smooth-rotatetable   the same for activations per token, as ExecuTorch's XNNPACK quantizes them
    w4g32a8kv8-edge        without SmoothQuant, and keys and values kept in int8

and with `wmix<megabytes>mb` for `w<bits>` each projection gets bits of its own, so that all fits a budget:

    wmix83mbg32-edge
"""

from toolchain.recipe.fields import CacheChoice, CalibrationSize, LearningChoice, Recipe, WeightFormat
from toolchain.recipe.reading import load_recipe, parse_recipe

__all__ = [
    "DEFAULT_RECIPE",
    "CacheChoice",
    "CalibrationSize",
    "LearningChoice",
    "Recipe",
    "WeightFormat",
    "load_recipe",
    "parse_recipe",
]

DEFAULT_RECIPE = "w4g32a8-edge-smooth"
