"""Q4_0, 4.5 bits: 32 weights d (q - 8), q of 4 bits."""
from .._triton import tl, triton
from .base import Block, byte, fields, fp16, half


def decode(block):
    return fp16(block, 0) * (fields(block, 2, 18, 4, 16).float() - 8.0)


@triton.jit
def read(block, unit, lane):
    b_q = (byte(block, 2 + lane) >> (unit * 4)) & 15
    return half(block, 0) * (b_q.to(tl.float32) - 8.0)


BLOCK = Block("Q4_0", 32, 18, (0,), decode, read)
