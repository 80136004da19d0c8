"""A layer of the host out of layers of the file: one, rows of one, several above each other, or several beside each other.

FLUX's single blocks have two of the latter kinds: linear1 = qkv above mlp_fc1, linear2 = out_proj beside mlp_fc2.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tiles
from .packing import Flat, packed
from .stored import HALF, Stored


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of a layer of the file."""

    stored: Stored
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.stored.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.stored.rows(self.start + start, self.start + stop)

    def flat(self) -> Flat:
        """Its tensors, row by row, as the layouts take them."""
        stored, rows = self.stored, slice(self.start, self.stop)
        return Flat(
            codes=tiles.weights(stored.weight)[rows], scale=stored.scales()[rows], smooth=stored.smooth, down=tiles.down(stored.down),
            up=tiles.up(stored.up)[rows], row_scale=None if stored.row_scale is None else stored.row_scale[rows],
            tensor_scale=stored.tensor_scale, unsigned=stored.unsigned)


@dataclass(frozen=True)
class Weight:
    """Segments above each other (axis 0) or beside each other (axis 1). offset: what their shifts add to the output, [N]."""

    segments: tuple[Segment, ...]
    axis: int = 0
    offset: Tensor | None = None

    @property
    def kind(self) -> str:
        return self.segments[0].stored.kind

    @property
    def shape(self) -> tuple[int, int]:
        (n, k), more = self.segments[0].shape, self.segments[1:]
        return (n + sum(segment.shape[0] for segment in more), k) if self.axis == 0 else (n, k + sum(segment.shape[1] for segment in more))

    @property
    def nbytes(self) -> int:
        return sum(segment.stored.nbytes * segment.shape[0] // segment.stored.shape[0] for segment in self.segments)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the weight in natural units, fp32: smoothing undone and the low-rank branch in it."""
        if self.axis == 1:
            return torch.cat([segment.rows(start, stop) for segment in self.segments], 1)
        parts, above = [], 0
        for segment in self.segments:
            first, last = max(start - above, 0), min(stop - above, segment.shape[0])
            if first < last:
                parts.append(segment.rows(first, last))
            above += segment.shape[0]
        return torch.cat(parts)

    def packed(self, dtype: torch.dtype) -> Tensor:
        """The weight as a QuantizedTensor that computes 4-bit products."""
        flats = [segment.flat() for segment in self.segments]
        small = dtype if dtype in HALF else flats[0].smooth.dtype      # what the kernels take
        return packed(self.kind, flats, self.axis, self.offset, dtype, small)
