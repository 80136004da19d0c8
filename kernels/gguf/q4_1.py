"""Q4_1, 5 bits: 32 weights d q + m, q of 4 bits."""
from .base import Block, fields, fp16


def decode(block):
    return fp16(block, 0) * fields(block, 4, 20, 4, 16).float() + fp16(block, 2)


BLOCK = Block("Q4_1", 32, 20, (0, 2), decode)
