"""The rotation that spreads outliers before rounding to int8: a regular Hadamard matrix over groups of 256 channels.

    H256 = H4 x H4 x H4 x H4 (Kronecker)        H4 = J/2 - P, of order 4: J is all ones, P turns the order round

It is symmetric and its own inverse, so x W^T = (x H)(W H)^T. The matrix is the one of comfy_kitchen ("convrot", ConvRot,
arXiv 2512.03673), so that codes made here and there meet in one product. Here it is applied as four sweeps of additions, always of
two at a time: the same bits in torch, in the interpreter and on a GPU.
"""
from torch import Tensor

from ._triton import tl, triton

GROUP = 256


def rotated(x: Tensor) -> Tensor:
    """x: [..., K] in fp32, K a multiple of 256. Returns x H, a new tensor."""
    if x.shape[-1] % GROUP:
        raise ValueError(f"rows of {x.shape[-1]} channels came; the rotation works on groups of {GROUP}")
    y = x
    for reach in (1, 4, 16, 64):
        four = y.reshape(-1, 2, 2, reach)
        pairs = four[:, :, 0] + four[:, :, 1]
        half = 0.5 * (pairs[:, :1] + pairs[:, 1:]).unsqueeze(2)
        y = half - four.flip(1, 2)
    return y.reshape(x.shape)


@triton.jit
def _sweep(b_x, REACH: tl.constexpr, N: tl.constexpr):
    """J/2 - I over every fourth-of-a-group of REACH neighbours. Without P: `rotate` makes up for that at once."""
    b_four = tl.reshape(b_x, (N // (4 * REACH), 2, 2, REACH))
    b_half = 0.5 * tl.sum(tl.sum(b_four, 2), 1)
    return tl.reshape(tl.expand_dims(tl.expand_dims(b_half, 1), 1) - b_four, (N,))


@triton.jit
def rotate(b_x, N: tl.constexpr):
    """b_x: [N] in fp32, N a multiple of 256. Returns x H with the blocks of 4 in each group back to front: store at `places(N)`.

    J P = J, so the P of three sweeps may wait until the end, where turning round whole blocks of 4 costs nothing.
    """
    # [N/4] each: the four of a block, which are in one thread
    b_even, b_odd = tl.split(tl.reshape(b_x, (N // 4, 2, 2)))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    b_half = 0.5 * ((b_0 + b_1) + (b_2 + b_3))
    b_y = tl.join(tl.join(b_half - b_3, b_half - b_1), tl.join(b_half - b_2, b_half - b_0))
    b_y = tl.reshape(b_y, (N,))
    b_y = _sweep(b_y, 4, N)
    b_y = _sweep(b_y, 16, N)
    return _sweep(b_y, 64, N)


@triton.jit
def places(N: tl.constexpr):
    """[N/4, 4]: the channel that each element of what `rotate` returned, reshaped to this, is of."""
    block = tl.arange(0, N // 4).to(tl.int64)
    return (block ^ 63)[:, None] * 4 + tl.arange(0, 4)[None, :]
