"""Rows to int8 codes:  scale = max|x| / 127,  code = x / scale, rounded to the nearest and halves to even.

As comfy_kitchen does it for fp32 rows (it also divides in the type of the row, which is coarser). A row of zeros has the scale 1e-30.
The products are exact in int32; what is off is the rounding here.
"""
import torch
from torch import Tensor

from ._triton import tl, triton

LEAST = 1e-30


def row_scales(x: Tensor) -> Tensor:
    """x: [..., K] in fp32. Returns [..., 1] in fp32."""
    return (x.abs().amax(-1, keepdim=True) / 127.0).clamp_min(LEAST)


def coded(x: Tensor, scales: Tensor) -> Tensor:
    """x: [..., K] in fp32; scales: [..., 1] in fp32. Returns int8 codes; what lies beyond the scale is held at its end."""
    return (x / scales).round_().clamp_(-128.0, 127.0).to(torch.int8)


@triton.jit
def row_scale(b_x):
    """b_x: [N] in fp32, zeros where there is no channel. Returns the scale of the row."""
    return tl.maximum(tl.max(tl.abs(b_x), 0) / 127.0, 1e-30)


@triton.jit
def code(b_x, scale):
    # Adding and taking away 1.5 * 2^23 rounds to the nearest, halves to even, for whatever is below 2^22.
    b_q = tl.minimum(tl.maximum(b_x / scale, -128.0), 127.0)
    return ((b_q + 12582912.0) - 12582912.0).to(tl.int8)
