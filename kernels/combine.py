"""Weighted sum of snapshots:  out = sum_k w_k H_k + anchor."""
from collections.abc import Sequence

import torch
from torch import Tensor


def reference(weights: Sequence[float], snapshots: Sequence[Tensor], anchor: Tensor | None = None) -> Tensor:
    """snapshots: K tensors of one shape and dtype; anchor likewise. Accumulates in fp32, returns their dtype, a new tensor.

    What an extrapolation carries beyond the range of fp16 is held at its end, as the host's fp16 blocks do.
    """
    out = torch.zeros_like(snapshots[0], dtype=torch.float32) if anchor is None else anchor.to(torch.float32, copy=True)
    for weight, snapshot in zip(weights, snapshots, strict=True):
        if weight:
            out.add_(snapshot, alpha=weight)
    if snapshots[0].dtype is torch.float16:
        out.clamp_(-65504.0, 65504.0)
    return out.to(snapshots[0].dtype)


combine = reference
