"""The transforms that a recipe can name, rotations of the residual stream before smoothing, `rotatedown` after it."""

from __future__ import annotations

from collections.abc import Callable

from toolchain.transforms.base import Transform
from toolchain.transforms.online import RotateDown, RotateQueryKey
from toolchain.transforms.rotate import RotateResidual, RotateValues
from toolchain.transforms.rotate_table import RotateTable

SMOOTH = "smooth"
LEARNED_ROTATION = "learnedrotation"

# A new rotation is one line here. Smoothing and learned rotations are not: they are searched for on the model.
ROTATIONS: dict[str, Callable[[int], list[Transform]]] = {
    "rotate": lambda seed: [RotateResidual(seed), RotateValues(seed)],
    "rotateuntied": lambda seed: [RotateResidual(seed, "untied"), RotateValues(seed)],
    "rotateheads": lambda seed: [RotateValues(seed)],
    "rotatekeys": lambda seed: [RotateQueryKey(seed)],
    "rotatedown": lambda seed: [RotateDown()],
    "rotatetable": lambda seed: [RotateTable(seed)],
}
NAMES = (SMOOTH, *ROTATIONS, LEARNED_ROTATION)
