"""Weights of a group and of a two-level group convolution that come as close as they can to a dense convolution's.

Dense filters (m, n, d, d) are N x N blocks W_kj, from the n/N channels of group j to the m/N outputs of group k. In the
notation of *Two-level Group Convolution* (https://arxiv.org/abs/2110.05060), Equation (3.5), with d0 = d, the two-level
form has A_k + s_kk (x) r_k in the place of W_kk, and s_kj (x) r_j in that of W_kj: r_j is the restriction R_0 of group
j, and s_kj the column j of S_k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def group_filters(dense: Tensor, groups: int) -> Tensor:
    """(m, n, d, d) -> (m, n/N, d, d): the diagonal blocks W_kk, to which A_k is equal."""
    blocks = dense.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))  # N, m/N, N, n/N, d, d
    return torch.cat([blocks[group, :, group] for group in range(groups)])


@torch.no_grad()
def coarse_filters(dense: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(m, n, d, d) -> restriction (N, n/N, d, d) and prolongation (m, N), in float64 and on the CPU.

    With A_k = W_kk they make the squared error of the operator as small as any two-level weights can. Whatever the
    other parameters are, A_k can make the diagonal blocks exact; what is left is a sum over the groups j, each term
    the error of one rank-one matrix s_j r_j^T against the rows of W_.j outside of group j, and of such matrices the
    leading singular pair is the best (Eckart-Young). The rows of the prolongation that would change a diagonal block
    are zero. The restriction has the norm of its He initialization, so that representatives are as large as other
    activations.
    """
    restriction, prolongation = [], []
    for group, columns in enumerate(dense.detach().to("cpu", torch.float64).chunk(groups, dim=1)):
        matrix = columns.flatten(1).clone()  # m, n/N * d * d
        matrix.chunk(groups)[group].zero_()
        direction = math.sqrt(2.0) * torch.linalg.svd(matrix, full_matrices=False).Vh[0]
        restriction.append(direction.view(columns.shape[1:]))
        prolongation.append(matrix @ direction / 2.0)
    return torch.stack(restriction), torch.stack(prolongation, dim=1)
