"""Hadamard matrices H (entries +-1, H H^T = n I), generated, and the random rotations that are made of them.

Sizes are Kronecker products of three constructions, with Q[a, b] = chi(a - b) over the field of q elements, chi(x) = 1
for a square, -1 for another element and 0 for zero (R. Paley, "On orthogonal matrices", 1933):

    Sylvester   [[1, 1], [1, -1]] with itself          powers of two
    Paley I     I + [[0, 1], [-1, Q]]                  q + 1, q = 3 mod 4
    Paley II    C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], C = [[0, 1], [1, Q]]    2 (q + 1), q = 1 mod 4
"""

from __future__ import annotations

import hashlib
import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from boa_edge.errors import UsageError

_LARGEST_POWER = 7  # of two, in one factor: products by 128 x 128 matrices


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix, float64 [n, n], the Kronecker product of those of `factors(n)`.

    Raises:
        UsageError: none of this size can be built here.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors(n):
        matrix = torch.kron(matrix, _core(factor))
    return matrix


def factors(n: int) -> tuple[int, ...]:
    """Sizes whose Hadamard matrices make up the one of size n, so that it can be applied by small products.

    The first factors carry the odd part of n, each the smallest there is; the others are powers of two up to 128, as
    few and as even as possible: 1536 = 12 x 128, 4864 = 76 x 64, 2048 = 64 x 32.

    Raises:
        UsageError: no Hadamard matrix of this size can be built here.
    """
    doublings = 0 if n < 1 else (n & -n).bit_length() - 1
    odd = None if n < 1 else _odd_factors(n >> doublings, doublings)
    if odd is None:
        fix = "Sizes: products of 2, q + 1 (q = 3 mod 4) and 2 (q + 1) (q = 1 mod 4), q a prime power"
        raise UsageError(f"no Hadamard matrix of size {n} can be built", fix=fix)
    left = (n // math.prod(odd)).bit_length() - 1
    count = -(-left // _LARGEST_POWER)
    powers = tuple(1 << (left + count - 1 - index) // count for index in range(count))
    return (*odd, *powers) or (1,)


def random_rotation(n: int, seed: int, *more: int) -> Tensor:
    """H diag(signs) / sqrt(n), orthogonal, float64 [n, n].

    It flips signs at random and then mixes where it multiplies columns, R x. Rows are multiplied by its transpose.

    Args:
        seed, more: whole numbers that choose the signs, the same on every machine and in every version.

    Raises:
        UsageError: no Hadamard matrix of this size can be built here.
    """
    name = "/".join(str(part) for part in (n, seed, *more))
    stream = hashlib.shake_256(f"boa-edge rotation {name}".encode()).digest(-(-n // 8))
    signs = [1.0 - 2.0 * (stream[index // 8] >> index % 8 & 1) for index in range(n)]
    return hadamard(n) * torch.tensor(signs, dtype=torch.float64) / math.sqrt(n)


def _odd_factors(odd: int, doublings: int) -> tuple[int, ...] | None:
    """Sizes with this odd part and at most so many factors 2; None where there are none."""
    if odd == 1:
        return ()
    for own in range(2, doublings + 1):
        if _paley(odd << own) is not None:
            return (odd << own,)
    for part in range(3, math.isqrt(odd) + 1, 2):
        if odd % part:
            continue
        for own in range(2, doublings - 1):
            rest = _odd_factors(odd // part, doublings - own)
            if rest is not None and _paley(part << own) is not None:
                return (part << own, *rest)
    return None


def _paley(n: int) -> tuple[int, int] | None:
    """The prime and its power q for which there is a Paley matrix of size n; None where there is none."""
    return _prime_power(n - 1) or (_prime_power(n // 2 - 1) if n % 8 == 4 else None)


def _prime_power(q: int) -> tuple[int, int] | None:
    """p and k with q = p^k, p an odd prime."""
    if q < 3 or q % 2 == 0:
        return None
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None


@lru_cache(maxsize=32)
def _core(n: int) -> Tensor:
    if n & (n - 1) == 0:
        pair, matrix = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), torch.ones(1, 1).double()
        for _ in range(n.bit_length() - 1):
            matrix = torch.kron(matrix, pair)
        return matrix
    field = _paley(n)
    assert field is not None
    q = field[0] ** field[1]
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:], bordered[1:, 1:] = 1, _differences(*field)
    bordered[1:, 0] = -1 if q % 4 == 3 else 1
    one = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        return one + bordered
    mixed = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    own = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered, mixed) + torch.kron(one, own)


def _differences(p: int, k: int) -> Tensor:
    """Q [q, q] over the field of q = p^k elements: polynomials of degree < k, element number sum_i c_i p^i."""
    q, places = p**k, torch.tensor([p**i for i in range(k)])
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[0] = 0
    chi[(_powers(p, k)[::2] * places).sum(1)] = 1  # squares are the even powers
    elements = torch.arange(q)[:, None] // places % p
    return torch.stack([chi[((element - elements) % p * places).sum(1)] for element in elements])


def _powers(p: int, k: int) -> Tensor:
    """All powers of a generator of the field, int64 [q - 1, k]: of x, modulo the first polynomial that makes it one."""
    one = [1] + [0] * (k - 1)
    for low in itertools.product(range(p), repeat=k):  # x^k + low_(k-1) x^(k-1) + ... + low_0
        element, powers = one, []
        for _ in range(p**k - 1):
            powers.append(element)
            carry = element[-1]
            element = [(c - carry * a) % p for c, a in zip([0, *element[:-1]], low, strict=True)]
            if element == one:
                break
        # One that does not come back to 1, or too early, does not generate everything.
        if len(powers) == p**k - 1 and element == one:
            return torch.tensor(powers)
    raise AssertionError("every finite field has a generator")
