"""One linear layer's weight, as its file has it."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Weights that stand in single precision at a time, 8 MiB. Pieces as large as malloc maps by themselves, 32 MiB, leave holes in the heap that
# come to 500 MiB in some runs; these leave 30, and take no longer.
CHUNK = 2 << 20


@dataclass(frozen=True)
class Layer:
    """What a format found in a file. Nothing is unpacked before `rows` is asked.

    `host`: the same weight under the keys that the host's own loader reads (suffixes such as ".weight", ".weight_scale",
    ".comfy_quant"), where the host can compute with it as it is. `packed`: makes a QuantizedTensor that computes without
    unpacking, where there is one.
    """

    name: str                                       # "double_blocks.0.img_attn.qkv"
    format: str                                     # "Q4_K", as the menus and the report have it
    shape: tuple[int, int]                          # [N, K]
    unpack: Callable[[int, int], Tensor]            # (first row, row after the last) -> float [n, K]
    nbytes: int                                     # in the file
    host: dict[str, Tensor] | None = None
    packed: Callable[[torch.dtype], Tensor] | None = None
    packed_int8: Callable[[torch.dtype], Tensor] | None = None      # the same, computing through int8 codes
    transcode: bool = False                         # packed, and better turned into the format that computes than kept: Q8_0

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Rows of the weight, [stop - start, K]."""
        return self.unpack(start, stop).to(device=device, dtype=dtype)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Row ranges of at most CHUNK weights, so that a layer never stands whole in single precision."""
        rows = max(1, CHUNK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], rows):
            yield start, min(start + rows, self.shape[0])
