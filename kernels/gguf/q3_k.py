"""Q3_K, 3.4 bits: 256 weights, every 16 of them d (s - 32) (q - 4), q of 3 bits, s of 6; the highest bits lie by themselves."""
from .base import Block, fields, fp16


def decode(block):
    s = fields(block, 96, 104, 4, 8) | fields(block, 104, 108, 2, 4) << 4
    q = fields(block, 32, 96, 2, 32) | fields(block, 0, 32, 1, 32) << 2
    return ((fp16(block, 108) * (s.float() - 32.0)).unsqueeze(2) * (q.view(-1, 16, 16).float() - 4.0)).view(-1, 256)


BLOCK = Block("Q3_K", 256, 110, (108,), decode)
