"""How the weights of a GGUF file lie in it: in blocks of 32 or 256 of a row, each with its scales.

A block format is a file beside this one and a line in `__init__.py`: its sizes, how torch decodes it and, where a kernel is worth
having, how Triton does. Both compute  w = d s q - m  in fp32. d is fp16 and s and q have few bits, so every product is exact, and both
give the same bits. The formats are ggml's; the tests hold them against the `gguf` package.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._triton import tl, triton

UNIT = 16       # weights that Triton decodes with one scale
AT_ONCE = 1 << 20       # weights that torch decodes at once: what it makes on the way is several times as large


@dataclass(frozen=True)
class Block:
    name: str                       # as in the gguf package
    weights: int                    # in a block
    bytes: int
    halves: tuple[int, ...]         # at which of them its fp16 numbers begin
    decode: Callable[[Tensor], Tensor]      # uint8 [blocks, bytes] -> fp32 [blocks, weights]
    read: Callable | None = None    # Triton, None where torch is all there is: (block, unit, lane) -> fp32 [R, 16]. block: [R, 1], pointers
                                    # to the first bytes; unit: [R, 1], which 16 weights of the block; lane: [1, 16]

    def columns(self, packed: Tensor) -> int:
        """How many weights a row of `packed`, uint8 [N, bytes of a row], holds."""
        if packed.dtype is not torch.uint8 or packed.dim() != 2 or packed.shape[1] % self.bytes:
            raise ValueError(f"{packed.dtype} {tuple(packed.shape)} came as {self.name}; rows of uint8, a multiple of {self.bytes} bytes, were expected")
        return packed.shape[1] // self.bytes * self.weights

    def values(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, [N, K]. Rows are decoded a few at a time, so that what it takes beside the result is bounded."""
        columns = self.columns(packed)
        out = torch.empty((packed.shape[0], columns), dtype=dtype, device=packed.device)
        for rows, into in zip(self.parts(packed), self.parts(out), strict=True):
            into.copy_(self.decode(rows.reshape(-1, self.bytes)).view(into.shape))
        return out

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """`tensor`, packed or decoded, a few rows at a time."""
        columns = self.columns(tensor) if tensor.dtype is torch.uint8 else tensor.shape[1]
        return tensor.split(max(1, AT_ONCE // max(columns, 1)))


# pieces that several formats share ---------------------------------------------------------------------------------------
def fp16(block: Tensor, start: int) -> Tensor:
    """The fp16 that begins at byte `start` of each block, [blocks, 1] in fp32."""
    return block[:, start:start + 2].contiguous().view(torch.float16).float()


def fields(block: Tensor, start: int, stop: int, width: int, run: int) -> Tensor:
    """Numbers of `width` bits, several to a byte: the lowest bits of `run` bytes come first, then the next bits of the same bytes.

    Returns uint8 [blocks, numbers].
    """
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=block.device).view(1, 1, -1, 1)
    return ((block[:, start:stop].reshape(len(block), -1, 1, run) >> shifts) & ((1 << width) - 1)).view(len(block), -1)


@triton.jit
def half(block, START: tl.constexpr):
    return tl.load((block + START).to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def byte(block, at):
    return tl.load(block + at).to(tl.int32)
