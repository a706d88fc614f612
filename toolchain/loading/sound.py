"""What is asked of a model's weights before any work is put into them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from boa_edge.errors import BoaEdgeError
from toolchain.families import DecoderSpec
from toolchain.loading.shards import Stored

_ROWS = 4096  # of a table, compared at a time


def check_finite(name: str, value: Tensor, where: Path) -> None:
    """Raises BoaEdgeError where a parameter holds a number that is none."""
    if bool(value.sum().isfinite()):  # a sum meets them all, and takes no second tensor
        return
    if wrong := int((~value.isfinite()).sum()):
        problem = f"{name} holds {wrong} values that are NaN or infinite, of {value.numel()}"
        fix = "Save the model again from a checkpoint whose weights are finite: its training may have diverged"
        raise BoaEdgeError(problem, where=where, fix=fix)


def check_model(model: nn.Module, where: Path) -> None:
    """`check_finite` of every parameter in memory."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            check_finite(name, parameter.detach(), where)


def check_head(directory: Path, stored: Mapping[str, Stored], spec: DecoderSpec) -> None:
    """A model whose head is said to be the embedding table has no other in its files.

    Raises:
        BoaEdgeError: it has; whether it is used depends on who loads the model.
    """
    if not spec.tied_embeddings:
        return
    head, table = f"{spec.head}.weight", f"{spec.embedding}.weight"
    if head in stored and table in stored and not _is_same(stored[head], head, stored[table], table):
        problem = f"says tie_word_embeddings, but the files hold a {head} that differs from {table}"
        fix = f'Set "tie_word_embeddings": false if that head is meant, or delete {head} from the files'
        raise BoaEdgeError(problem, where=directory / "config.json", fix=fix)


def _is_same(one: Stored, name: str, two: Stored, other: str) -> bool:
    if one.shape != two.shape:
        return False
    with safe_open(one.file, framework="pt") as stream, safe_open(two.file, framework="pt") as other_stream:
        left, right = stream.get_slice(name), other_stream.get_slice(other)
        starts = range(0, one.shape[0], _ROWS)
        return all(torch.equal(left[start : start + _ROWS], right[start : start + _ROWS]) for start in starts)
