"""A dense W [O, Z, X] as a sum of blocks, by alternating least squares in float64.

    W[o,z,x] = sum_k sum_aij P[o,k,a] G[k,a,i,j] C[k,i,z] A[k,j,x]

One block is Tucker's decomposition, blocks of size 1 with G = 1 are CP's, others De Lathauwer's block terms.
Each factor is the solution of a linear problem with the others fixed, so no sweep makes the error larger.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    factor_out: Tensor  # [O, K, ro]
    factor_z: Tensor  # [K, rz, Z]
    factor_x: Tensor  # [K, rx, X]
    core: Tensor  # [K, ro, rz, rx]

    def dense(self) -> Tensor:
        return torch.einsum("oka,kaij,kiz,kjx->ozx", *(self[n] for n in (0, 3, 1, 2)))


def decompose(
    weight: Tensor, ranks: tuple[int, int, int], blocks: int, fixed_core: bool, sweeps: int = 200
) -> Blocks:
    """The blocks of least squares of W, with ranks (ro, rz, rx). ``fixed_core``: G stays 1, as in CP."""
    target = weight.detach().double()
    out, context, width = target.shape
    sizes = tuple(zip((out, context, width), ranks, strict=True))
    if blocks == 1:
        started = (_leading(target.movedim(mode, 0).flatten(1), rank) for mode, (_, rank) in enumerate(sizes))
    else:
        generator = torch.Generator().manual_seed(0)
        shapes = ((size, blocks * rank) for size, rank in sizes)
        started = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    p, c, a = (t.to(target.device).unflatten(1, (blocks, -1)) for t in started)
    core = target.new_ones(blocks, *ranks)
    found = Blocks(p, c.permute(1, 2, 0), a.permute(1, 2, 0), core)
    if not fixed_core:
        found = _fit_cores(target, found)
    error = last = (target - found.dense()).square().sum()
    for sweep in range(sweeps):
        found = _sweep(target, found, fixed_core)
        error = (target - found.dense()).square().sum()
        if sweep and error >= last * (1 - 1e-9):
            break
        last = error
    return found


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors; directions beyond their number are arbitrary."""
    vectors = torch.linalg.svd(unfolded, full_matrices=False).U[:, :rank]
    missing = rank - vectors.shape[1]
    if missing == 0:
        return vectors
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(len(vectors), missing, generator=generator, dtype=vectors.dtype)
    return torch.cat((vectors, more.to(vectors.device)), 1)


def _solve(rows: Tensor, target: Tensor) -> Tensor:
    """f [N, R] with f rows = target for rows [R, M] and target [N, M]: least squares, of the least norm."""
    return target @ torch.linalg.pinv(rows)


def _sweep(target: Tensor, found: Blocks, fixed_core: bool) -> Blocks:
    p, c, a, core = found
    blocks, ro, rz, rx = core.shape
    rows = torch.einsum("kaij,kiz,kjx->kazx", core, c, a).reshape(blocks * ro, -1)
    p = _solve(rows, target.flatten(1)).unflatten(1, (blocks, ro))
    rows = torch.einsum("kaij,oka,kjx->kiox", core, p, a).reshape(blocks * rz, -1)
    c = _solve(rows, target.transpose(0, 1).flatten(1)).unflatten(1, (blocks, rz)).permute(1, 2, 0)
    rows = torch.einsum("kaij,oka,kiz->kjoz", core, p, c).reshape(blocks * rx, -1)
    a = _solve(rows, target.permute(2, 0, 1).flatten(1)).unflatten(1, (blocks, rx)).permute(1, 2, 0)
    p, c, a = _balanced(p, c, a)
    fitted = Blocks(p, c, a, core)
    return fitted if fixed_core else _fit_cores(target, fitted)


def _balanced(p: Tensor, c: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same blocks with factors of equal norm in each of them."""
    norms = [f.movedim(k, 0).flatten(1).norm(dim=1) for f, k in ((p, 1), (c, 0), (a, 0))]
    mean = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    scale = [torch.where(n > 0, mean / n, n.new_ones(())) for n in norms]
    return p * scale[0][:, None], c * scale[1][:, None, None], a * scale[2][:, None, None]


def _fit_cores(target: Tensor, found: Blocks) -> Blocks:
    """One core after the other, to what the others leave."""
    p, c, a, core = found
    cores = list(core)
    for k in range(len(cores)):
        if len(cores) > 1:
            cores[k] = torch.zeros_like(cores[k])
            rest = target - found._replace(core=torch.stack(cores)).dense()
        else:
            rest = target
        inverses = (torch.linalg.pinv(t) for t in (p[:, k], c[k].mT, a[k].mT))
        cores[k] = torch.einsum("ozx,ao,iz,jx->aij", rest, *inverses)
    return found._replace(core=torch.stack(cores))
