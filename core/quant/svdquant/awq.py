"""Modulation layers of nunchaku files: 4-bit weights, activations at full precision (AWQ, W4A16).

    W = q w + z,   q in 0 .. 15,  w and z one for 64 columns of a row

nunchaku lets the outputs that one channel has for shift, scale, gate, ... stand beside each other, and its bias has the 1 of
(1 + scale) in it. Here they stand as the host has them: all shifts, all scales, all gates, and no 1.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.quant_ops import QuantizedTensor, register_layout_class
from comfy_kitchen.tensor import TensorCoreAWQW4A16Layout
from torch import Tensor

from ..files import WeightFile
from ..layer import CHUNK
from . import tiles
from .header import Header
from .stored import HALF, Parts

LAYOUT = "RepriseAWQLayout"


class ModulationLayout(TensorCoreAWQW4A16Layout):
    """comfy_kitchen's own, saved as int8."""

    class Params(TensorCoreAWQW4A16Layout.Params):
        type = "AWQ int4"

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale}


register_layout_class(LAYOUT, ModulationLayout)


@dataclass(frozen=True)
class Modulation:
    """[N, K] of `splits` outputs for each channel."""

    weight: Tensor          # int32 [N / 4, K / 2]
    scale: Tensor           # [K / 64, N]
    zero: Tensor            # [K / 64, N]
    bias: Tensor            # fp32 [N], as the host has it
    splits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0] * 4, self.weight.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weight, self.scale, self.zero))

    def stored_rows(self, start: int, stop: int) -> Tensor:
        """Where the file has the host's rows."""
        row = torch.arange(start, stop)
        channels = self.shape[0] // self.splits
        return row % channels * self.splits + row // channels

    def rows(self, start: int, stop: int) -> Tensor:
        """fp32 [stop - start, K]."""
        at = self.stored_rows(start, stop)
        scale, zero = (tensor[:, at].t().float().unsqueeze(-1) for tensor in (self.scale, self.zero))
        numbers = tiles.codes(tiles.awq_rows(self.weight, at)).float().view(len(at), -1, tiles.GROUP)
        return numbers.mul_(scale).add_(zero).view(len(at), -1)

    def packed(self, dtype: torch.dtype) -> QuantizedTensor:
        """For comfy_kitchen's product, whose zero is that of q - 8."""
        at = self.stored_rows(0, self.shape[0])
        codes = torch.cat([tiles.awq_rows(self.weight, some) for some in at.split(max(1, CHUNK // self.shape[1]))])
        scale, zero = self.scale[:, at], (self.zero.float() + 8 * self.scale.float())[:, at]
        params = ModulationLayout.Params(
            scale=scale.to(dtype).contiguous(), zeros=zero.to(dtype).contiguous(), orig_dtype=dtype, orig_shape=self.shape, group_size=tiles.GROUP)
        return QuantizedTensor(codes.view(torch.int8), LAYOUT, params)


def take(file: WeightFile, head: Header, left: dict, name: str, splits: int) -> Modulation:
    """Takes a modulation layer out of `left`. BadFile, naming it, where a part is missing or does not fit the others."""
    parts = Parts(file, head, left, name)
    weight, scale, zero, bias = (parts.need(part) for part in ("qweight", "wscales", "wzeros", "bias"))
    if weight.dtype is not torch.int32 or weight.ndim != 2:
        raise parts.bad(f"its qweight is {parts.told(weight)}, and words of four rows beside each other were expected")
    n, k = weight.shape[0] * 4, weight.shape[1] * 2
    if not n or not k or n % splits or k % tiles.GROUP:
        raise parts.bad(f"its {n} x {k} weights are not {splits} for each channel, in groups of 64")
    groups = k // tiles.GROUP
    padded = -(-groups // 16) * 16       # the packer rounds up; groups beyond the weight's are never read
    rows = padded if scale.ndim == 2 and scale.shape[0] == padded else groups
    for part, tensor in (("wscales", scale), ("wzeros", zero)):
        parts.fits(part, tensor, (rows, n))
    parts.fits("bias", bias, (n,), (*HALF, torch.float32))
    ones = torch.zeros(splits, dtype=torch.float32)
    ones[1] = ones[-2] = 1.0            # shift, scale, gate, for attention and then for the MLP
    bias = (bias.float().view(-1, splits) - ones).t().reshape(-1)       # fp32: a half has not the digits for b + 1 - 1
    return Modulation(weight, scale[:groups], zero[:groups], bias, splits)
