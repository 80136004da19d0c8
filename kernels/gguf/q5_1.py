"""Q5_1, 6 bits: 32 weights d q + m, q of 5 bits, whose highest lie by themselves."""
from .base import Block, fields, fp16


def decode(block):
    return fp16(block, 0) * (fields(block, 8, 24, 4, 16) | fields(block, 4, 8, 1, 1) << 4).float() + fp16(block, 2)


BLOCK = Block("Q5_1", 32, 24, (0, 2), decode)
