"""The best low-rank form of a change of a weight matrix (Eckart and Young 1936)."""

import torch

from onebase_adapters.primitives.instruction_set import LowRank

_EXACT = 1e-5
"""Below that a singular value is rounding, relative to the largest."""


def refactorise(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product `b` [out, r] `a` [r, in], in factors of its own size: orthogonal rows and columns, largest
    first. Where two products nearly cancel, each alone needs more digits than their sum."""
    (outer, b_core), (inner, a_core) = torch.linalg.qr(b), torch.linalg.qr(a.t())
    u, s, vh = torch.linalg.svd(b_core @ a_core.t())
    root = s.sqrt()
    return root[:, None] * (vh @ inner.t()), (outer @ u) * root


def factorise(site: str, change: torch.Tensor, most_rank: int) -> LowRank | None:
    """LowRank of at most `most_rank` for a change [out, in] of float32; None for no change."""
    rank = min(most_rank, *change.shape)
    if rank == min(change.shape):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=min(rank + 16, *change.shape), niter=4)
        vh = v.t()
    if not s[0] > 0:
        return None
    kept = int((s[:rank] > _EXACT * s[0]).sum())
    root = s[:kept].sqrt()
    return LowRank(site, root[:, None] * vh[:kept], u[:, :kept] * root, 1.0)
