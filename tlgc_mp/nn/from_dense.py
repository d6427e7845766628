"""Weights of a group and of a two-level group convolution that come as close as they can to a dense convolution's.

Dense filters (m, n, d, d) are N x N blocks W_kj, from the n/N channels of group j to the m/N outputs of group k. In the
notation of *Two-level Group Convolution* (https://arxiv.org/abs/2110.05060), Equation (3.5), with d0 = d, the two-level
form has A_k + S_kk R_k in the place of W_kk, and S_kj R_j in that of W_kj: R_j are the r restrictions of group j, and
S_kj the r columns of S_k that are for them; the same S_k for every j where representatives are summed.

All is computed in float64 and on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SWEEPS = 30
"""Of least squares, to fit summed representatives."""
_SINGULAR = 1e-12
"""Eigenvalues of r x r matrices, in units of the largest, that are taken for zero."""


@torch.no_grad()
def group_filters(dense: Tensor, groups: int) -> Tensor:
    """(m, n, d, d) -> (m, n/N, d, d): the diagonal blocks W_kk, to which A_k is equal."""
    blocks = dense.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))  # N, m/N, N, n/N, d, d
    return torch.cat([blocks[group, :, group] for group in range(groups)])


@torch.no_grad()
def balanced_filters(dense: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(m, n, d, d) -> the filters A_k and B_k of a balanced group convolution, (m, n/N, d, d) each: of least error is
    for B_k / N the mean of the blocks W_kj off the diagonal, and for A_k what is left of W_kk."""
    own = group_filters(dense, groups)
    if groups == 1:
        return own, torch.zeros_like(own)
    mean = (dense.unflatten(1, (groups, -1)).sum(1) - own) / (groups - 1)
    return own - mean, groups * mean


@torch.no_grad()
def two_level_filters(dense: Tensor, groups: int, count: int, summed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(m, n, d, d) -> weight (m, n/N, d, d), restriction (N r, n/N, d, d) and prolongation (m, N r), or (m, r) where
    representatives are summed.

    Whatever the other parameters are, A_k can make the diagonal blocks exact, and does. What is left without a sum is a
    sum over the groups j, each term the error of one matrix S_.j R_j of rank r against the rows of W_.j outside of
    group j, and of such matrices the r leading singular pairs are the best (Eckart-Young). The squared error is then as
    small as any two-level weights can make it; the rows of the prolongation that would change a diagonal block are
    zero. With a sum, one matrix S R of rank r stands for all blocks off the diagonal, which no decomposition gives;
    least squares for R and for S in turn come close to the best. The restrictions have the norm of their He
    initialization, so that what is shared is as large as other activations.
    """
    whole = dense.detach().to("cpu", torch.float64)
    blocks = [columns.flatten(1) for columns in whole.chunk(groups, dim=1)]  # N of (m, n/N * d * d)
    fine = group_filters(whole, groups)
    if summed:
        prolongation, rows = _summed(blocks, count)
        by_group = torch.cat(rows, 1).view(count, groups, *fine.shape[1:])  # r, N, n/N, d, d
        own = [part @ row for part, row in zip(prolongation.chunk(groups), rows, strict=True)]
        return fine - torch.cat(own).view(fine.shape), by_group.transpose(0, 1).flatten(0, 1), prolongation
    columns: list[Tensor] = []
    restriction: list[Tensor] = []
    for group, block in enumerate(blocks):
        others = block.clone()
        others.chunk(groups)[group].zero_()
        for into, factor in zip((columns, restriction), _balanced(*_best(others, count)), strict=True):
            into.append(factor)
    return fine, torch.cat(restriction).view(-1, *fine.shape[1:]), torch.cat(columns, 1)


def _best(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(p, q) -> (p, r) and (r, q), whose product is the best approximation of rank r.

    The eigenvectors of the smaller of its two Gram matrices take a fraction of the time of a singular value
    decomposition, and are as good: what they leave out is what is least.
    """
    p, q = matrix.shape
    gram = matrix @ matrix.t() if p <= q else matrix.t() @ matrix
    leading = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]  # min(p, q), r or fewer
    left, right = (leading, leading.t() @ matrix) if p <= q else (matrix @ leading, leading.t())
    missing = count - leading.shape[1]
    if missing > 0:
        left = torch.cat((left, left.new_zeros(p, missing)), 1)
        right = torch.cat((right, right.new_zeros(missing, q)))
    return left, right


def _summed(blocks: list[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
    """S (m, r) and R_j (r, n/N * d * d), j = 1, ..., N, that fit the blocks W_kj off the diagonal."""
    groups = len(blocks)
    left, right = _best(torch.cat(blocks, 1), count)
    apart = torch.cat(blocks, 1)
    for group, rows in enumerate(apart.chunk(groups)):
        rows.chunk(groups, 1)[group].zero_()
    for _ in range(SWEEPS):
        right = torch.cat(_solved(left.chunk(groups), (left.t() @ apart).chunk(groups, 1)), 1)
        rights = [row.t() for row in right.chunk(groups, 1)]
        left = torch.cat([part.t() for part in _solved(rights, (right @ apart.t()).chunk(groups, 1))])
    left, right = _balanced(left, right)
    return left, list(right.chunk(groups, 1))


def _solved(factors: Sequence[Tensor], products: Sequence[Tensor]) -> list[Tensor]:
    """For each group the least X for which F X is closest to W, where F joins the ``factors`` (., r) of all other
    groups, and ``products`` are F^T W."""
    grams = [factor.t() @ factor for factor in factors]
    total = torch.stack(grams).sum(0)
    return [
        torch.linalg.pinv(total - own, rtol=_SINGULAR, hermitian=True) @ product
        for own, product in zip(grams, products, strict=True)
    ]


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with rows of norm sqrt(2) on the right: where one has none, the column gives nothing, and the
    row is one that lets it learn."""
    norms = right.norm(dim=1)
    empty = norms <= norms.max() * 1e-12
    norms = norms.masked_fill(empty, 1.0)
    units = torch.eye(right.shape[1], dtype=right.dtype)[torch.arange(len(right)) % right.shape[1]]
    right = torch.where(empty[:, None], units, right / norms[:, None])
    left = (left * norms).masked_fill(empty, 0.0)
    return left / math.sqrt(2.0), right * math.sqrt(2.0)
