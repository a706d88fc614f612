"""Mixed precision: bits per projection under a budget of bytes.

The choice is a knapsack with one item per module: at each of 2, 3, 4 and 8 bits a module has a price, exact, and a
predicted error (`toolchain.sensitivity`); the sum of the errors is to be least at a price that the budget covers. With
prices counted in their greatest common divisor the table of the dynamic programme is small (SmolLM2-135M: 210 modules,
some 6,000 entries), so the answer is the optimum: a larger budget can never give a larger predicted error. Only where
the divisor is so small that the table would pass 200,000 entries are prices rounded up to a coarser unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from boa_edge.errors import UsageError
from toolchain.checkpoint import float_dtype
from toolchain.loading import SourceModel
from toolchain.quantized import SUPPORTED_BITS, payload_size
from toolchain.recipe import Recipe

_TABLE = 200_000


@dataclass(frozen=True)
class Item:
    """A module, whose projections must all have the same bits.

    Attributes:
        bytes: payload at each bit width.
        errors: predicted error at each bit width.
    """

    name: str
    bytes: Mapping[int, int]
    errors: Mapping[int, float]


def allocate(items: Sequence[Item], budget: int) -> dict[str, int]:
    """Bits by module, of the least total error that at most `budget` bytes allow.

    Raises:
        ValueError: the budget does not cover the fewest bits everywhere.
    """
    least, most = min(SUPPORTED_BITS), max(SUPPORTED_BITS)
    spare = budget - sum(item.bytes[least] for item in items)
    if spare < 0:
        raise ValueError(f"the budget lacks {-spare} bytes even at {least} bits")
    increases = [{bits: item.bytes[bits] - item.bytes[least] for bits in SUPPORTED_BITS} for item in items]
    whole = sum(increase[most] for increase in increases)
    if spare >= whole:
        return {item.name: most for item in items}
    unit = max(math.gcd(*(price for increase in increases for price in increase.values())), -(-whole // _TABLE), 1)
    capacity = spare // unit
    best = np.zeros(capacity + 1)  # the least error at a price of at most so many units
    taken = np.zeros((len(items), capacity + 1), np.uint8)
    for row, (item, increase) in enumerate(zip(items, increases, strict=True)):
        now = np.full(capacity + 1, np.inf)
        for bits in SUPPORTED_BITS:
            price = -(-increase[bits] // unit)
            if price > capacity:
                continue
            error = best[: capacity + 1 - price] + item.errors[bits]
            better = error < now[price:]
            now[price:][better] = error[better]
            taken[row, price:][better] = bits
        best = now
    chosen: dict[str, int] = {}
    left = capacity
    for row in reversed(range(len(items))):
        bits = int(taken[row, left])
        chosen[items[row].name] = bits
        left -= -(-increases[row][bits] // unit)
    return {item.name: chosen[item.name] for item in items}


def module_bytes(source: SourceModel, recipe: Recipe) -> dict[str, dict[int, int]]:
    """Payload of every module that holds projections, by name and bits."""
    weights, found = recipe.weights, {}
    for name in source.spec.linear_inputs():
        rows, columns = source.model.get_parameter(f"{name}.weight").shape
        found[name] = {
            bits: payload_size(
                rows, columns, columns // (weights.group_size or columns), bits, weights.symmetric, recipe.scale_bits
            )
            for bits in SUPPORTED_BITS
        }
    return found


def fixed_bytes(source: SourceModel, recipe: Recipe) -> int:
    """Payload of all the rest, which no allocation changes: tables, norms, biases."""
    spec = source.spec
    tied = spec.tied_embeddings and not recipe.unties_head
    tables = [spec.embedding] + ([] if tied else [spec.head])
    linears = spec.linear_inputs()
    total = 0
    for name, value in source.model.state_dict().items():
        module, _, part = name.rpartition(".")
        if name == f"{spec.head}.weight" and tied:
            continue
        if module in linears and part == "weight":
            continue
        if module in tables and part == "weight" and recipe.embedding is not None:
            rows, columns = value.shape
            fmt = recipe.embedding
            total += payload_size(
                rows, columns, columns // (fmt.group_size or columns), fmt.bits, True, recipe.scale_bits
            )
        else:
            total += value.numel() * float_dtype(source.config, value, transformed=bool(recipe.transforms)).itemsize
    return total


def check_budget(source: SourceModel, recipe: Recipe) -> int | None:
    """The bytes that a recipe with `bits: auto` leaves to the blocks' linears; None for other recipes.

    Raises:
        UsageError: they do not suffice at 2 bits.
    """
    if recipe.weights.budget_mb is None:
        return None
    fixed = fixed_bytes(source, recipe)
    least = fixed + sum(sizes[min(SUPPORTED_BITS)] for sizes in module_bytes(source, recipe).values())
    budget = round(recipe.weights.budget_mb * 1e6)
    if budget < least:
        smallest = f"{math.ceil(least / 1e3) / 1e3:.3f}"
        problem = f"a budget of {recipe.weights.budget_mb:g} MB is too small: at 2 bits everywhere the payload is "
        fix = f"Ask for {smallest} MB or more; {fixed / 1e6:.3g} MB of it are embedding table, norms and the like"
        raise UsageError(f"{problem}{smallest} MB", where="weights.budget_mb", fix=fix)
    return budget - fixed
