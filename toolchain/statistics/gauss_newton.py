"""Row Hessians of q and k that see the softmax: Gauss-Newton, without any object of the size of attention cubed.

To first order the attention output at position l answers to a change D of W_Q by C_l R_l D x_l, with
C_l = scaling W_O,h Cov_{a_l}(v, k), the covariance of values and keys under the attention weights of l; and to a change
of W_K by sum_m u_lm (q_l^T R_m D x_m), with u_lm = scaling a_lm W_O,h (v_m - o_l). So the exact second-order forms are

    W_Q    sum_l x_l x_l^T (x) R_l^T C_l^T C_l R_l
    W_K    sum_m x_m x_m^T (x) R_m^T (sum_l |u_lm|^2 q_l q_l^T) R_m      (m = m' terms)

A norm on each head of q or k puts its Jacobian behind R (`toolchain.statistics.head_norm`); where scores are capped,
a_lm stands for a_lm times the cap's slope at l, m wherever a logit's change is meant.

They are causal, weighted by attention and by what W_O makes of it, and relative positions stay coherent, none of which
holds for BoA's sum_m k_m k_m^T. Here the row factors are averaged over a sample of positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from toolchain import distributed
from toolchain.statistics.covariance import gram_root
from toolchain.statistics.head_norm import HeadNorm
from toolchain.statistics.rope import turn_back

POSITIONS = 8
"""How many positions are sampled from each sequence."""


class GaussNewtonRows:
    """Accumulates both row Hessians of one block.

    Args:
        output_weight: W_O [d, heads * hd].
        inv_freq, scaling: of the block's RoPE, as `turn_back` takes them.
        head_norms: the norms on each head, by role.
        per_sequence: positions sampled from each sequence.
    """

    def __init__(
        self,
        output_weight: Tensor,
        heads: int,
        groups: int,
        head_dim: int,
        inv_freq: Tensor,
        per_sequence: int = POSITIONS,
        *,
        scaling: float = 1.0,
        head_norms: Mapping[str, HeadNorm] | None = None,
    ) -> None:
        by_head = output_weight.view(-1, heads, head_dim).transpose(0, 1)
        # |W_O,h y| = |y root|: the outputs themselves are never formed. A head may be of low rank, or switched off.
        self._root = gram_root(by_head.mT @ by_head).mT
        self._inv_freq, self._count, self._scaling, self._norms = inv_freq, per_sequence, scaling, head_norms or {}
        self._generator = torch.Generator().manual_seed(0)
        self.queries = output_weight.new_zeros(heads, head_dim, head_dim)
        self.keys = output_weight.new_zeros(groups, head_dim, head_dim)

    def skip(self, sequences: int, length: int) -> None:
        """Draw what other ranks draw for their sequences of `length` tokens, which come before this rank's."""
        for _ in range(sequences):
            torch.randperm(length, generator=self._generator)

    def reduce(self) -> None:
        """On to what all ranks have accumulated."""
        distributed.add_up(self.queries, self.keys)

    def add(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weights: Tensor,
        slopes: Tensor | None,
        token_weights: Tensor | None,
    ) -> None:
        """One sequence: x [L, d], what the projections took in; query [H, L, hd], key and value [G, L, hd], weights
        [H, L, L], slopes of the cap on the scores [H, L, L] or None, token_weights [L].
        """
        heads, length, hd = query.shape
        group = heads // key.shape[0]
        sample = torch.randperm(length, generator=self._generator)[: self._count]
        scale = 1.0 if token_weights is None else float(token_weights.mean().sqrt())
        before = {role: norm.before(x[sample]) for role, norm in self._norms.items()}  # [P, heads, hd]

        def back(vectors: Tensor, role: str, head: int) -> Tensor:
            turned = turn_back(vectors, sample, self._inv_freq, self._scaling)
            if role in self._norms:
                turned = self._norms[role].pull_back(turned, before[role][:, head])
            return turned.reshape(-1, hd) * scale

        for h in range(heads):
            k, v, a, q = key[h // group], value[h // group] @ self._root[h], weights[h], query[h]
            out = a @ v
            a = a if slopes is None else a * slopes[h]
            # W_Q: root^T Cov(v, k) R_l, stacked over the sampled l; its Gram matrix is the sum wanted.
            seen = a[sample]  # [P, L]
            moment = (seen[:, :, None] * v).mT @ k - out[sample][:, :, None] * (seen @ k)[:, None, :]  # [P, hd, hd]
            turned = back(moment, "q", h)
            self.queries[h].addmm_(turned.mT, turned)
            # W_K: |u_lm|^2 for the sampled m, then the weighted Gram matrix of R_m^T q_l.
            spread = v[sample].square().sum(-1) - 2 * out @ v[sample].mT + out.square().sum(-1, keepdim=True)  # [L, P]
            size = a[:, sample] * spread.clamp_min(0).sqrt()
            pulled = (size.mT[:, :, None] * q).contiguous()  # [P, L, hd]
            turned = back(pulled, "k", h // group)
            self.keys[h // group].addmm_(turned.mT, turned)
