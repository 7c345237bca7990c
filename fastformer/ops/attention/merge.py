"""Merging attention over parts of the keys: ring and context parallelism, shared prefixes, split caches."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.ops.validate import check_tensor


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both parts, from the outputs and LSEs over each.

    With w = sigmoid(lse_a - lse_b): out = w * out_a + (1 - w) * out_b, lse = logaddexp(lse_a, lse_b). A part in which a
    row had nothing to attend to (LSE -inf) counts nothing, whatever its output holds. Differentiable.

    Args:
        out_a, out_b: (..., Dv), one dtype.
        lse_a, lse_b: (...), floating point: `out`'s shape without the last dimension.

    Returns:
        (out, lse): out in out_a's dtype, lse in lse_a's.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree; the message names the argument.
    """
    check_tensor("out_a", out_a, dtypes=(torch.float32, torch.float16, torch.bfloat16, torch.float64))
    check_tensor("out_b", out_b, dtypes=(out_a.dtype,), shape=tuple(out_a.shape), device=out_a.device)
    rows = tuple(out_a.shape[:-1])
    check_tensor("lse_a", lse_a, dtypes=(torch.float32, torch.float64), shape=rows, device=out_a.device)
    check_tensor("lse_b", lse_b, dtypes=(lse_a.dtype,), shape=rows, device=out_a.device)
    empty_a, empty_b = lse_a == -torch.inf, lse_b == -torch.inf
    # Finite stand-ins keep -inf - -inf out of both passes; the selections below undo them.
    a, b = torch.where(empty_a, 0.0, lse_a), torch.where(empty_b, 0.0, lse_b)
    share = torch.where(empty_a, 0.0, torch.where(empty_b, 1.0, torch.sigmoid(a - b))).unsqueeze(-1)
    wide = share.dtype
    parts = (
        torch.where(empty_a.unsqueeze(-1), 0.0, out_a.to(wide)) * share,
        torch.where(empty_b.unsqueeze(-1), 0.0, out_b.to(wide)) * (1.0 - share),
    )
    both = torch.logaddexp(a, b)
    lse = torch.where(empty_a, torch.where(empty_b, -torch.inf, b), torch.where(empty_b, a, both))
    # A row that neither part has anything for: the share is 0, and so are both parts.
    return (parts[0] + parts[1]).to(out_a.dtype), lse
