"""Q6_K, 6.6 bits: 256 weights, every 16 of them (d s) (q - 32), q of 6 bits, whose two highest lie by themselves, s of 8."""
import torch

from .._triton import tl, triton
from .base import Block, byte, fields, fp16, half


def decode(block):
    s = block[:, 192:208].contiguous().view(torch.int8).float()
    q = fields(block, 0, 128, 4, 64) | fields(block, 128, 192, 2, 32) << 4
    return ((fp16(block, 208) * s).unsqueeze(2) * (q.view(-1, 16, 16).float() - 32.0)).view(-1, 256)


@triton.jit
def read(block, unit, lane):
    part, at = unit // 2 % 4, unit % 2 * 16 + lane          # which 32 of 128 weights
    b_q = (byte(block, unit // 8 * 64 + part % 2 * 32 + at) >> (part // 2 * 4)) & 15
    b_q |= ((byte(block, 128 + unit // 8 * 32 + at) >> (part * 2)) & 3) << 4
    b_s = tl.load(block + (192 + unit)).to(tl.int8, bitcast=True).to(tl.float32)
    return half(block, 208) * b_s * (b_q.to(tl.float32) - 32.0)


BLOCK = Block("Q6_K", 256, 210, (208,), decode, read)
