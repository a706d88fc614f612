"""Refinement of a solved weight on its stored loss tr(H_row D H_col D^T); no data are needed.

`refit_scales` is the least-squares optimum of the scales for given codes (TurboBoA, arXiv 2602.04929, refines them one
at a time; the problem is linear, so here all scales that interact are solved for at once). `descend` is coordinate
descent on the codes: every step lowers the loss, so it cannot do harm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.grids import Grid, round_scale
from toolchain.quantized import code_range
from toolchain.solvers import kernels

_RIDGE = 1e-3  # relative; holds scales that the loss hardly sees where they are
_NORMALS = 1 << 24  # entries of normal matrices at a time


def weigh(change: Tensor, columns: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """`losses`, and half their gradient H_row D H_col [n, rows, columns]."""
    gradient = change @ columns
    if rows is None:
        return (gradient * change).sum(-1), gradient
    gradient = rows @ gradient
    return (gradient * change).sum((-2, -1))[:, None], gradient


def losses(change: Tensor, columns: Tensor, rows: Tensor | None) -> Tensor:
    """tr(H_row D H_col D^T) of each unit of a stack: [n, rows] where H_row is the identity, [n, 1] otherwise.

    Args:
        change: [n, rows, columns].
        columns: [1 or n, columns, columns].
        rows: [n, rows, rows] or None.
    """
    return weigh(change, columns, rows)[0]


def refit_scales(target: Tensor, codes: Tensor, grid: Grid, columns: Tensor, rows: Tensor | None) -> Grid:
    """The grid with the scales that minimise the loss of `codes`; zero points stay.

    Args:
        target: what the codes are to stand for, [n, rows, columns].
        codes: float holding integers, [n, rows, columns].
    """
    groups = grid.scales.shape[-1]
    size = codes.shape[-1] // groups
    levels = codes - grid.zeros.repeat_interleave(size, -1)
    if rows is not None and groups == 1:
        scales = _refit_heads(target, levels, grid.scales, columns, rows)
    elif rows is None:
        count = max(1, _NORMALS // (codes.shape[0] * groups**2))
        parts = zip(target.split(count, 1), levels.split(count, 1), grid.scales.split(count, 1), strict=True)
        scales = torch.cat([_refit_rows(*part, columns) for part in parts], 1)
    else:
        normals = _normals(levels, columns, groups)
        # Rows interact through H_row: one Gauss-Seidel sweep over them.
        scales = grid.scales.clone()
        left = target - levels * scales.repeat_interleave(size, -1)
        for i in range(codes.shape[1]):
            own = slice(i, i + 1)
            curvature = rows[:, own, own]
            # A row that the loss does not see stays as it is, and the others with it.
            pull = (rows[:, own] @ left) / torch.where(curvature > 0, curvature, torch.ones_like(curvature))
            wanted = (target[:, own] - left[:, own] + pull) @ columns
            scales[:, own] = _solve_normals(normals[:, own], _moments(wanted, levels[:, own], groups), scales[:, own])
            left[:, own] = target[:, own] - levels[:, own] * scales[:, own].repeat_interleave(size, -1)
    good = torch.isfinite(scales) & (scales > 0.2 * grid.scales) & (scales < 5 * grid.scales)
    return Grid(round_scale(torch.where(good, scales, grid.scales), grid.format), grid.zeros, grid.format)


def _refit_rows(target: Tensor, levels: Tensor, scales: Tensor, columns: Tensor) -> Tensor:
    """The best scales of rows that nothing joins, [n, rows, groups]."""
    groups = scales.shape[-1]
    moments = _moments(target @ columns, levels, groups)
    return _solve_normals(_normals(levels, columns, groups), moments, scales)


def _moments(weighted: Tensor, levels: Tensor, groups: int) -> Tensor:
    """sum over k in g of (T H)_k c_k: [n, rows, groups]."""
    return (weighted * levels).unflatten(-1, (groups, -1)).sum(-1)


def _normals(levels: Tensor, columns: Tensor, groups: int) -> Tensor:
    """sum over j in g, k in g' of c_j H_jk c_k: [n, rows, groups, groups]."""
    n, rows, width = levels.shape
    if groups == 1:
        return ((levels @ columns) * levels).sum(-1)[..., None, None]
    size = width // groups
    normals = levels.new_empty(n, rows, groups, groups)
    for g in range(groups):  # on and above the diagonal; a product per group keeps the intermediate small
        start = g * size
        spread = levels[:, :, start : start + size] @ columns[:, start : start + size, start:]
        normals[:, :, g, g:] = (spread.mul_(levels[:, :, start:])).unflatten(-1, (groups - g, size)).sum(-1)
    upper = normals.triu()
    return upper + upper.triu(1).mT


def _solve_normals(normals: Tensor, moments: Tensor, scales: Tensor) -> Tensor:
    """Least-squares scales from normals [..., s, s] and moments [..., s], held a little where `scales` [..., s] are."""
    wide = normals.to(torch.float64)
    ridge = _RIDGE * wide.diagonal(dim1=-2, dim2=-1)
    right = moments.to(torch.float64) + ridge * scales.to(torch.float64)
    wide.diagonal(dim1=-2, dim2=-1).add_(ridge + 1e-30)
    return torch.linalg.solve(wide, right.unsqueeze(-1)).squeeze(-1).to(scales.dtype)


def _refit_heads(target: Tensor, levels: Tensor, scales: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """All rows of a head at once: (H_row o C H_col C^T) s = diag(H_row T H_col C^T), [n, rows, 1]."""
    weighted = levels @ columns  # C H_col
    normals = rows * (weighted @ levels.mT)
    moments = ((rows @ target) * weighted).sum(-1)
    return _solve_normals(normals, moments, scales[..., 0]).unsqueeze(-1)


def descend(
    gradient: Tensor, codes: Tensor, grid: Grid, columns: Tensor, rows: Tensor | None, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Coordinate descent on the codes, at most `sweeps` times through all of them; every step lowers the loss.

    Args:
        gradient: what `weigh` says of `codes`, [n, rows, columns].
        codes: [n, rows, columns].
    Returns: codes of a loss that is not higher, and their gradient.
    """
    low, high = code_range(grid.format.bits)
    scales, _ = grid.expand(codes.shape[2])
    result, slopes = (tensor.clone(memory_format=torch.contiguous_format).cpu() for tensor in (codes, gradient))
    hessians = [columns] if rows is None else [columns, rows]
    arrays = [tensor.contiguous().cpu().numpy() for tensor in (*hessians, scales)]
    kernel = kernels.descend_rows if rows is None else kernels.descend_heads
    kernel(slopes.numpy(), *arrays, low, high, result.numpy(), sweeps)
    return result.to(codes.device), slopes.to(codes.device)
