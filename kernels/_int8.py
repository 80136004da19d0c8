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
def magnitude(b_x):
    """b_x in fp32, as integers that sort as |x| does, NaN above all."""
    return b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(b_magnitude):
    """b_magnitude: [N]. Returns the scale of a row of these, NaN where there is one."""
    largest = tl.max(b_magnitude, 0).to(tl.float32, bitcast=True)
    return tl.maximum(largest / 127.0, 1e-30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def code(b_x, scale):
    return nearest(tl.minimum(tl.maximum(b_x / scale, -128.0), 127.0))


@triton.jit
def nearest(b_q):
    """b_q: in fp32, from -128 to 127. Returns int8, halves to even."""
    # Adding 1.5 * 2^23 rounds so, for whatever is below 2^22, and leaves the integer in the lowest bits.
    return (b_q + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
