"""One quantized linear layer as a nunchaku file has it: checked, and unpacked a few rows at a time.

    W = R / s + U D^T,   R = q w     int4:  q in -8 .. 7,  w one for 64 columns of a row
                                     nvfp4: q an e2m1 number,  w one for 16 columns, times one for the row or for all

The branch sees the layer's input as it is, the residual the smoothed one; so both stand in one weight, in natural units.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..files import BadFile, WeightFile
from ..layer import CHUNK
from . import tiles
from .header import Header

SHIFT = 0.171875        # above what GELU gives at its lowest: with it, what enters the layer after is positive and has 15 steps, not 7
HALF = (torch.bfloat16, torch.float16)
NUMBERS = {"int4": tiles.int4, "nvfp4": tiles.e2m1}
SPELLINGS = {"smooth": ("smooth", "smooth_factor"), "down": ("lora_down", "proj_down"), "up": ("lora_up", "proj_up")}


def residual(numbers: Tensor, scale: Tensor, smooth: Tensor) -> Tensor:
    """R / s in fp32, in the place of `numbers`: what the codes stand for, [n, K]. scale [n, K / group]; smooth [K]."""
    rows, columns = numbers.shape
    numbers.view(rows, scale.shape[1], -1).mul_(scale.float().unsqueeze(-1))
    return numbers.div_(smooth.float())


@dataclass(frozen=True)
class Stored:
    """A linear layer of the file, [N, K]. Vectors are in natural order, all else is as the file has it."""

    name: str
    kind: str                       # "int4" or "nvfp4"
    weight: Tensor                  # int8 [N, K / 2], tiled
    scale: Tensor                   # tiled: [K / 64, N], or float8 [K / 16, N]
    smooth: Tensor                  # [K]
    down: Tensor                    # [K, r], tiled
    up: Tensor                      # [N, r], tiled
    bias: Tensor | None             # [N]
    row_scale: Tensor | None        # [N], of nvfp4
    tensor_scale: float             # of nvfp4, else 1
    unsigned: bool                  # the input is shifted and quantized without a sign

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weight, self.scale, self.smooth, self.down, self.up))

    def scales(self, first: int = 0, last: int | None = None) -> Tensor:
        """Of row tiles `first` to `last`, [rows, K / group], as stored."""
        groups, tall = self.scale.shape[0], self.shape[0] // tiles.TILE
        stored = self.scale.reshape(tall, -1)[first:last].reshape(groups, -1)
        return tiles.scales(stored).t() if self.kind == "int4" else tiles.micro_scales(stored)

    def residual(self, start: int, stop: int) -> Tensor:
        """R / s of some rows, fp32 [stop - start, K]."""
        first, last = start // tiles.TILE, -(-stop // tiles.TILE)
        rows = residual(NUMBERS[self.kind](tiles.weights(self.weight, first, last)), self.scales(first, last), self.smooth)
        rows = rows[start - first * tiles.TILE:stop - first * tiles.TILE]
        if self.row_scale is not None:
            rows = rows.mul_(self.row_scale[start:stop, None].float())
        return rows if self.tensor_scale == 1 else rows.mul_(self.tensor_scale)

    def rows(self, start: int, stop: int) -> Tensor:
        """The weight that the layer computes with before its activations are quantized, fp32 [stop - start, K]."""
        first, last = start // tiles.TILE * tiles.TILE, -(-stop // tiles.TILE) * tiles.TILE
        up = tiles.up(self.up[first:last])[start - first:stop - first].float()
        return torch.addmm(self.residual(start, stop), up, tiles.down(self.down).float().t())

    def offset(self) -> Tensor | None:
        """What the shift of the input adds to the output, fp32 [N]; the file's bias has it taken away."""
        if not self.unsigned:
            return None
        rows, columns = self.shape
        step = max(1, CHUNK // columns // tiles.TILE) * tiles.TILE
        return SHIFT * torch.cat([self.residual(start, min(start + step, rows)).sum(1) for start in range(0, rows, step)])


def take(file: WeightFile, head: Header, left: dict, name: str, gelu: bool = False) -> Stored:
    """Takes a layer out of `left`. BadFile, naming it, where a part is missing or does not fit the others.

    gelu: whether the layer stands behind a GELU, where int4 files have their inputs shifted and without a sign.
    """
    parts = Parts(file, head, left, name)
    weight, scale = parts.need("qweight"), parts.need("wscales")
    kind = "nvfp4" if scale.dtype is torch.float8_e4m3fn else "int4"
    if head.kind and kind != head.kind:
        raise parts.bad(f"its scales are those of {kind} where the header says {head.kind}")
    if weight.dtype is not torch.int8 or weight.ndim != 2:
        raise parts.bad(f"its qweight is {parts.told(weight)}, and bytes of two 4-bit codes in rows were expected")
    n, k = weight.shape[0], weight.shape[1] * 2
    if not n or not k or n % tiles.TILE or k % tiles.TILE:
        raise parts.bad(f"its {n} x {k} weights do not come in tiles of 128")
    parts.fits("wscales", scale, (k // (tiles.GROUP if kind == "int4" else tiles.MICRO), n), (torch.float8_e4m3fn,) if kind == "nvfp4" else HALF)
    smooth = parts.vector("smooth", k)
    if not bool((smooth.isfinite() & (smooth != 0)).all()):
        raise parts.bad("its smoothing has zeros or numbers that are none")
    down, up = parts.branch(n, k, scale.dtype if kind == "int4" else smooth.dtype)
    if kind == "int4" and not bool(scale.isfinite().all()):
        raise parts.bad("its wscales have values that are no finite numbers")
    row_scale, one = (parts.vector("wcscales", n, missing=True), parts.number("wtscale")) if kind == "nvfp4" else (None, 1.0)
    return Stored(name, kind, weight, scale, smooth, down, up, parts.vector("bias", n, missing=True), row_scale, one, gelu and kind == "int4")


class Parts:
    """The tensors of one layer, each checked as it is taken."""

    def __init__(self, file: WeightFile, head: Header, left: dict, name: str):
        self.file, self.head, self.left, self.name = file, head, left, name
        for unused in ("smooth_orig", "smooth_factor_orig"):       # nunchaku's kernels read neither
            left.pop(f"{name}.{unused}", None)

    def bad(self, what: str) -> BadFile:
        return BadFile(f"'{self.file.name}': layer '{self.name}' is SVDQuant, and {what}; download the file again, or choose one that nunchaku opens")

    @staticmethod
    def told(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

    def find(self, part: str) -> Tensor | None:
        for spelling in SPELLINGS.get(part, (part,)):
            tensor = self.left.pop(f"{self.name}.{spelling}", None)
            if tensor is not None:
                if not isinstance(tensor, Tensor):
                    raise self.bad(f"its {spelling} is a GGUF block")
                return tensor
        return None

    def need(self, part: str) -> Tensor:
        tensor = self.find(part)
        if tensor is None:
            raise self.bad(f"it has no {SPELLINGS.get(part, (part,))[0]}")
        return tensor

    def fits(self, part: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = HALF) -> Tensor:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.bad(f"its {part} is {self.told(tensor)} where {wanted} {shape} was expected")
        return tensor

    def vector(self, part: str, length: int, missing: bool = False) -> Tensor | None:
        """A vector in natural order."""
        tensor = self.find(part) if missing else self.need(part)
        if tensor is None:
            return None
        return tiles.scales(self.fits(part, tensor, (length,)))

    def branch(self, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(down [K, r], up [N, r]); zeros where the file has no branch at all."""
        down, up = self.find("down"), self.find("up")
        if down is None and up is None and not self.head.rank:
            return torch.zeros(k, tiles.RANKS, dtype=dtype), torch.zeros(n, tiles.RANKS, dtype=dtype)
        if down is None or up is None:
            raise self.bad(f"it has no {'lora_down' if down is None else 'lora_up'}")
        rank = down.shape[-1] if down.ndim == 2 else 0
        if not rank or rank % tiles.RANKS:
            raise self.bad(f"its branch has a rank of {rank}, which is not in sixteens")
        if self.head.rank and -(-self.head.rank // tiles.RANKS) * tiles.RANKS != rank:
            raise self.bad(f"its branch has a rank of {rank} where the header says {self.head.rank}")
        return self.fits("lora_down", down, (k, rank)), self.fits("lora_up", up, (n, rank))

    def number(self, part: str) -> float:
        tensor = self.find(part)
        if tensor is None:
            return 1.0
        if tensor.numel() != 1 or not tensor.dtype.is_floating_point or not bool(tensor.float().isfinite().all()):
            raise self.bad(f"its {part} is {self.told(tensor)} where one finite number was expected")
        return float(tensor)
