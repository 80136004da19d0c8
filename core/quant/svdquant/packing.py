"""Layers of a file as one weight that computes: their tensors in rows and columns, one behind the other."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from comfy.quant_ops import QuantizedTensor, get_layout_class
from comfy_kitchen.float_utils import to_blocked
from torch import Tensor

from .layout import INT4_LAYOUT, NVFP4_LAYOUT, Piece, turned


@dataclass(frozen=True)
class Flat:
    """One segment in rows and columns. codes: uint8 [N, K / 2], column 2 j in the low bits; scale [N, K / group]."""

    codes: Tensor
    scale: Tensor
    smooth: Tensor          # [K]
    down: Tensor            # [K, r]
    up: Tensor              # [N, r]
    row_scale: Tensor | None
    tensor_scale: float
    unsigned: bool

    @property
    def piece(self) -> Piece:
        return Piece(self.up.shape[0], self.smooth.shape[0], self.up.shape[1], self.unsigned, self.tensor_scale)


def packed(kind: str, flats: list[Flat], axis: int, offset: Tensor | None, dtype: torch.dtype, small: torch.dtype) -> QuantizedTensor:
    """A weight of `kind` that computes in `dtype`; small: the type of its 16-bit tensors. offset [N]: what shifts of the input add."""
    flats = gathered(flats) if axis == 0 else flats
    if any(flat.row_scale is not None for flat in flats):
        flats = [flat if flat.row_scale is not None else replace(flat, row_scale=torch.ones(len(flat.codes))) for flat in flats]
    if kind == "int4":
        layout, codes, scales = INT4_LAYOUT, [flat.codes for flat in flats], [flat.scale.to(small).t() for flat in flats]
    else:
        layout, codes, scales = NVFP4_LAYOUT, [turned(flat.codes) for flat in flats], [blocked(flat.scale) for flat in flats]
    halves = {name: chained([getattr(flat, name).to(small) for flat in flats]) for name in ("smooth", "down", "up")}
    rows = [flat.row_scale.to(small) for flat in flats if flat.row_scale is not None]
    (n, k), pieces = flats[0].piece[:2], tuple(flat.piece for flat in flats)
    size = (sum(piece.rows for piece in pieces), k) if axis == 0 else (n, sum(piece.columns for piece in pieces))
    params = get_layout_class(layout).Params(
        scale=chained(scales), orig_dtype=dtype, orig_shape=size, **halves, row_scale=chained(rows) if rows else torch.zeros(0, dtype=small),
        offset=torch.zeros(0) if offset is None else offset, pieces=pieces, axis=axis)
    return QuantizedTensor(chained(codes).view(torch.int8), layout, params)


def gathered(flats: list[Flat]) -> list[Flat]:
    """Segments above each other that smooth their input alike become one: the input is quantized once.

        [R1; R2] + [U1 0; 0 U2] [D1 D2]^T
    """
    first, more = flats[0], flats[1:]
    if not more or not all(alike(first, flat) for flat in more):
        return flats
    scale = chained([flat.scale for flat in flats]).view(-1, first.scale.shape[1])
    row_scale = None if first.row_scale is None else torch.cat([flat.row_scale for flat in flats])
    return [replace(first, codes=torch.cat([flat.codes for flat in flats]), scale=scale, row_scale=row_scale,
                    down=torch.cat([flat.down for flat in flats], 1), up=torch.block_diag(*(flat.up for flat in flats)))]


def alike(one: Flat, other: Flat) -> bool:
    return (one.unsigned == other.unsigned and one.tensor_scale == other.tensor_scale and torch.equal(one.smooth, other.smooth)
            and (one.row_scale is None) == (other.row_scale is None))


def chained(tensors: list[Tensor]) -> Tensor:
    """One behind the other, flat; of any type, also those that torch does not join."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)


def blocked(scale: Tensor) -> Tensor:
    """float8 [N, K / 16] in the order in which the host's nvfp4 product reads it."""
    return to_blocked(scale.view(torch.uint8)).view(scale.dtype)
