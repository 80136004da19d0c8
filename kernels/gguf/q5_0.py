"""Q5_0, 5.5 bits: 32 weights d (q - 16), q of 5 bits, whose highest lie by themselves."""
from .base import Block, fields, fp16


def decode(block):
    return fp16(block, 0) * ((fields(block, 6, 22, 4, 16) | fields(block, 2, 6, 1, 1) << 4).float() - 16.0)


BLOCK = Block("Q5_0", 32, 22, (0,), decode)
