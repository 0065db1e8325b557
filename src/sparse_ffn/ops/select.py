"""Top-k in torch.topk's order, NaN first, whose ties go to the lower index on every device (its own may not)."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries of the last dimension, largest first, ties to the lower index.

    A NaN is larger than infinity, so that what diverged is selected and shows; NaNs are equal to each other.

    Args:
        scores: [..., n], any floating dtype; -inf ranks last.
        k: 1 <= k <= n.

    Returns:
        int64 [..., k].
    """
    n = scores.shape[-1]
    if scores.dtype == torch.float64 or scores.device.type == "mps":
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # float32 leaves 29 bits of a float64 free: they take the index, so that no two keys are equal and the (several
    # times faster) unstable topk gives the stable answer. The last term separates zeros.
    key = scores.double().nan_to_num(nan=7e38, posinf=3.5e38, neginf=-3.5e38)
    position = torch.arange(n, device=scores.device, dtype=torch.float64)
    key = key - (key.abs() * 2.0**-50 + 2.0**-200) * position
    return key.topk(k, dim=-1).indices


def eager_stable_topk(scores: Tensor, k: int) -> Tensor:
    """``stable_topk``, faster on a CPU by a choice that depends on the data: not for tracing.

    torch.topk alone is right for rows whose k + 1 largest descend strictly, with no NaN among them; only the others are
    redone.
    """
    if scores.device.type != "cpu":
        return stable_topk(scores, k)
    rows = scores.reshape(-1, scores.shape[-1])
    best, index = rows.topk(min(k + 1, rows.shape[1]), dim=1)
    tied = ~(best[:, 1:] < best[:, :-1]).all(1)
    index = index[:, :k].contiguous()
    if tied.any():
        index[tied] = stable_topk(rows[tied], k)
    return index.view(*scores.shape[:-1], k)
