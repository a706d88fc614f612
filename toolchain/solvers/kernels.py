"""The solvers' loops, compiled for the CPU: the same arithmetic as their tensor forms, one weight after the other.

A weight's columns must be rounded in order, which as tensor operations is a call per column; compiled, a row is one
loop. Used where tensors are on the CPU; every kernel is tested against the tensor form or the dense solver.

Shapes: weight, scales, zeros, codes [n, rows, columns]; factors and Hessians of rows [n, d, d], of columns
[1 or n, d, d]: one for all is not copied, at 4096 inputs and 32 heads that were 2 GB. All arrays are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The compiled form, on as many threads as PyTorch has."""
    kernel = njit(parallel=True, cache=True, nogil=True)(function)

    @wraps(function)
    def run(*arrays: Any) -> None:
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        torch.set_num_threads(threads)  # Numba's first use sets OpenMP's, and so PyTorch's, to all cores
        kernel(*arrays)

    return run


@_compiled
def one_sided_block(weight, upper, scales, zeros, low, high, codes, errors):  # type: ignore[no-untyped-def]
    """GPTQ over a block of columns; rows are independent. `weight` is overwritten, `codes` and `errors` are filled."""
    n, rows, columns = weight.shape
    for task in prange(n * rows):
        h, i = task // rows, task % rows
        own = upper[h % upper.shape[0]]
        row = weight[h, i].copy()
        for j in range(columns):
            scale, zero = scales[h, i, j], zeros[h, i, j]
            code = min(max(np.rint(row[j] / scale) + zero, low), high)
            codes[h, i, j] = code
            error = (row[j] - (code - zero) * scale) / own[j, j]
            errors[h, i, j] = error
            factor = own[j]
            for k in range(j + 1, columns):
                row[k] -= error * factor[k]


@_compiled
def two_sided(weight, upper, coupling, scales, zeros, low, high, codes):  # type: ignore[no-untyped-def]
    """BoA: heads are independent, rows of a head are not. `weight` is overwritten with row_start - rounded.

    coupling [n, rows, rows]: U_r[i, i'] / U_r[i, i], what row i' takes of the change of row i.
    """
    n, rows, columns = weight.shape
    for h in prange(n):
        own = upper[h % upper.shape[0]]
        for i in range(rows):
            start = weight[h, i]
            for earlier in range(i):
                pull, change = coupling[h, earlier, i], weight[h, earlier]
                for k in range(columns):
                    start[k] -= pull * change[k]
            row = start.copy()
            for j in range(columns):
                scale, zero = scales[h, i, j], zeros[h, i, j]
                value = row[j]
                code = min(max(np.rint(value / scale) + zero, low), high)
                codes[h, i, j] = code
                rounded = (code - zero) * scale
                start[j] -= rounded
                error = (value - rounded) / own[j, j]
                factor = own[j]
                for k in range(j + 1, columns):
                    row[k] -= error * factor[k]


@_compiled
def descend_rows(gradient, columns_hessian, scales, low, high, codes, sweeps):  # type: ignore[no-untyped-def]
    """Coordinate descent, H_row the identity. gradient [n, rows, columns] = D H_col, kept up to date."""
    n, rows, columns = codes.shape
    for task in prange(n * rows):
        h, i = task // rows, task % rows
        own = columns_hessian[h % columns_hessian.shape[0]]
        for _ in range(sweeps):
            changed = 0
            for j in range(columns):
                if own[j, j] <= 0:  # an input that was never used: the loss does not see its codes
                    continue
                scale = scales[h, i, j]
                old = codes[h, i, j]
                new = min(max(np.rint(old - gradient[h, i, j] / (own[j, j] * scale)), low), high)
                if new != old:
                    codes[h, i, j] = new
                    step = (new - old) * scale
                    changed += 1
                    slope, curvature = gradient[h, i], own[j]
                    for k in range(columns):
                        slope[k] += step * curvature[k]
            if changed == 0:
                break


@_compiled
def descend_heads(gradient, columns_hessian, rows_hessian, scales, low, high, codes, sweeps):  # type: ignore[no-untyped-def]
    """Coordinate descent on tr(H_row D H_col D^T). gradient [n, rows, columns] = H_row D H_col, kept up to date."""
    n, rows, columns = codes.shape
    for h in prange(n):
        own = columns_hessian[h % columns_hessian.shape[0]]
        for _ in range(sweeps):
            changed = 0
            for i in range(rows):
                for j in range(columns):
                    scale = scales[h, i, j]
                    old = codes[h, i, j]
                    curvature = rows_hessian[h, i, i] * own[j, j] * scale
                    if curvature <= 0:
                        continue
                    new = min(max(np.rint(old - gradient[h, i, j] / curvature), low), high)
                    if new != old:
                        codes[h, i, j] = new
                        changed += 1
                        step = (new - old) * scale
                        spread = own[j]
                        for other in range(rows):
                            pull, slope = step * rows_hessian[h, i, other], gradient[h, other]
                            for k in range(columns):
                                slope[k] += pull * spread[k]
            if changed == 0:
                break
