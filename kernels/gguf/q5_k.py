"""Q5_K, 5.5 bits: 256 weights, every 32 of them (d s) q - (dmin m), q of 5 bits, whose highest lie by themselves, s and m of 6."""
from .._triton import tl, triton
from .base import Block, byte, fields
from .q4_k import read_scales, scales


def decode(block):
    s, m = scales(block)
    q = fields(block, 48, 176, 4, 32) | fields(block, 16, 48, 1, 32) << 4
    return (s * q.view(-1, 8, 32).float() - m).view(-1, 256)


@triton.jit
def read(block, unit, lane):
    part = unit // 2
    b_s, b_m = read_scales(block, part)
    at = unit % 2 * 16 + lane
    b_q = (byte(block, 48 + part // 2 * 32 + at) >> (part % 2 * 4)) & 15
    b_q |= ((byte(block, 16 + at) >> part) & 1) << 4
    return b_s * b_q.to(tl.float32) - b_m


BLOCK = Block("Q5_K", 256, 176, (0, 2), decode, read)
