"""Block formats of GGUF files. A new one is a file here and a line below."""
from . import q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from .base import UNIT, Block

BLOCKS: dict[str, Block] = {
    module.BLOCK.name: module.BLOCK
    for module in (
        q8_0,
        q6_k,
        q5_k,
        q5_1,
        q5_0,
        q4_k,
        q4_1,
        q4_0,
        q3_k,
        q2_k,
    )
}


def block_format(name: str) -> Block:
    if name not in BLOCKS:
        raise ValueError(f"'{name}' is no block format that is known here; known: {', '.join(BLOCKS)}")
    return BLOCKS[name]


__all__ = ["BLOCKS", "UNIT", "Block", "block_format"]
