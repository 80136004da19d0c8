"""Q2_K, 2.6 bits: 256 weights, every 16 of them (d s) q - (dmin m), q of 2 bits, s and m of 4."""
from .base import Block, fields, fp16


def decode(block):
    s, m = (block[:, :16] & 15).float(), (block[:, :16] >> 4).float()
    q = fields(block, 16, 80, 2, 32).view(-1, 16, 16).float()
    return ((fp16(block, 80) * s).unsqueeze(2) * q - (fp16(block, 82) * m).unsqueeze(2)).view(-1, 256)


BLOCK = Block("Q2_K", 256, 84, (80, 82), decode)
