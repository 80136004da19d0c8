"""Q4_K, 4.5 bits: 256 weights, every 32 of them (d s) q - (dmin m), q of 4 bits, s and m of 6."""
import torch
from torch import Tensor

from .._triton import tl, triton
from .base import Block, byte, fields, fp16, half


def scales(block: Tensor) -> tuple[Tensor, Tensor]:
    """d s and dmin m of each 32 weights, [blocks, 8, 1]. The last four of each have their high bits above those of the first four."""
    first, second, rest = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    s = torch.cat((first & 63, rest & 15 | (first >> 6) << 4), 1)
    m = torch.cat((second & 63, rest >> 4 | (second >> 6) << 4), 1)
    return (fp16(block, 0) * s.float()).unsqueeze(2), (fp16(block, 2) * m.float()).unsqueeze(2)


def decode(block):
    s, m = scales(block)
    return (s * fields(block, 16, 144, 4, 32).view(-1, 8, 32).float() - m).view(-1, 256)


@triton.jit
def read_scales(block, part):
    """As `scales`, of the 32 weights `part`: [R, 1], 0 to 7."""
    b_first, b_second, b_rest = byte(block, 4 + part % 4), byte(block, 8 + part % 4), byte(block, 12 + part % 4)
    b_s = tl.where(part < 4, b_first & 63, (b_rest & 15) | (b_first >> 6 << 4))
    b_m = tl.where(part < 4, b_second & 63, (b_rest >> 4) | (b_second >> 6 << 4))
    return half(block, 0) * b_s.to(tl.float32), half(block, 2) * b_m.to(tl.float32)


@triton.jit
def read(block, unit, lane):
    part = unit // 2
    b_s, b_m = read_scales(block, part)
    b_q = (byte(block, 16 + part // 2 * 32 + unit % 2 * 16 + lane) >> (part % 2 * 4)) & 15
    return b_s * b_q.to(tl.float32) - b_m


BLOCK = Block("Q4_K", 256, 144, (0, 2), decode, read)
