"""Q8_0, 8.5 bits: 32 weights d q, q of 8 bits."""
import torch

from .._triton import tl, triton
from .base import Block, fp16, half


def decode(block):
    return fp16(block, 0) * block[:, 2:].contiguous().view(torch.int8).float()


@triton.jit
def read(block, unit, lane):
    b_q = tl.load(block + (2 + unit * 16 + lane)).to(tl.int8, bitcast=True)
    return half(block, 0) * b_q.to(tl.float32)


BLOCK = Block("Q8_0", 32, 34, (0,), decode, read)
