"""GGUF layers that stay packed: blocks in memory, turned into numbers for the length of one product.

    int8:   codes, from the blocks by a kernel; then comfy_kitchen's int8 product, or ours where it has none that is fast.
            The scales of the rows are found when the file is opened.
    decode: floats, from the blocks; then an ordinary product

The host sees a QuantizedTensor, which it moves, offloads and streams as its own. What is saved is the host's int8 with rotation.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

import comfy.model_management
import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_op
from comfy_kitchen.tensor import BaseLayoutParams, register_layout_class
from comfy_kitchen.tensor.base import dequantize_args
from torch import Tensor
from torch.nn import functional as F

from ...kernels.int8_linear import int8_linear
from ...kernels.quantize import quantize_rows
from . import blocks
from .capabilities import capabilities
from .files import Blocks
from .later import later
from .machine import KITCHEN

LAYOUT = "RepriseGGUFLayout"
FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}        # as comfy_kitchen's operators number them


class GGUFLayout(QuantizedLayout):
    """qdata: uint8 [N, bytes of a row]."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale: fp32 [N, 1], of the rows' int8 codes; empty where they are not computed with."""

        type: str = ""
        compute: str = "decode"         # or "int8"
        own: bool = False               # the int8 product is Reprise's kernel, where comfy_kitchen has none that is fast
        convrot: bool = False           # the names are the host's, which writes them into the mark of a saved layer
        convrot_groupsize: int = 256
        transposed: bool = False

        @property
        def group(self) -> int:
            return self.convrot_groupsize if self.convrot else 0

    @classmethod
    def quantize(cls, tensor: Tensor, **options):
        raise TypeError("weights are not encoded as GGUF blocks; a layer that changes becomes int8 with rotation")

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        return blocks.values(qdata, params.type, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """The layer as the host's int8, made when it is read."""
        return later(tuple(params.orig_shape), qdata.nbytes, params.scale.nbytes, lambda: cls.int8(qdata, params))

    @classmethod
    def int8(cls, qdata: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Codes and scales of the rotated rows, as they are computed with."""
        if params.scale.numel():
            return blocks.codes(qdata, params.type, params.scale, params.group), params.scale
        return blocks.quantized(blocks.values(qdata, params.type), params.group)


register_layout_class(LAYOUT, GGUFLayout)


def of_blocks(weight) -> bool:
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == LAYOUT


@cache
def own_product(device: torch.device) -> bool:
    """Whether Reprise's int8 product is the fast one there is."""
    way = capabilities(device).int8
    return way.fast and not way.by.startswith(KITCHEN)


def pack(found: Blocks, dtype: torch.dtype, compute: str = "decode") -> QuantizedTensor:
    """A weight [N, K] that computes in `dtype` from its blocks. compute: "int8" or "decode"."""
    (rows, columns), group = found.shape, blocks.rotation_group(found.shape[1])
    scale, own = torch.empty(0, dtype=torch.float32), False
    if compute == "int8":
        device = comfy.model_management.get_torch_device()
        scale = blocks.scales(found.bytes, found.type, group, device)
        own = own_product(device) and group in blocks.BY_KERNEL
    return QuantizedTensor(found.bytes, LAYOUT, GGUFLayout.Params(
        scale=scale, orig_dtype=dtype, orig_shape=(rows, columns), type=found.type, compute=compute, own=own,
        convrot=bool(group), convrot_groupsize=group or 256))


# products --------------------------------------------------------------------------------------------------------------
def product(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x: [..., K]; weight: packed [N, K]. Returns [..., N] in the type of x."""
    if isinstance(x, QuantizedTensor):
        x = x.dequantize()
    params, held = weight._params, weight._qdata.contiguous()
    if params.compute == "int8" and x.dtype in FLOATS:
        codes = blocks.codes(held, params.type, params.scale, params.group)
        if params.own:
            rows, row_scales = quantize_rows(x.contiguous(), params.convrot)
            return int8_linear(rows, row_scales, codes, params.scale, bias, out_dtype=x.dtype)
        return torch.ops.comfy_kitchen.int8_linear(x.contiguous(), codes, params.scale, bias, FLOATS[x.dtype], params.convrot, params.convrot_groupsize)
    return F.linear(x, blocks.values(held, params.type, x.dtype), bias)


def own_int8(x: Tensor, weight, bias: Tensor | None) -> Tensor | None:
    """x W^T + b of a layer in the host's int8, by Reprise's kernel; None where that does not serve the layer."""
    if not isinstance(weight, QuantizedTensor) or weight._layout_cls != "TensorWiseINT8Layout" or x.dtype not in FLOATS:
        return None
    params = weight._params
    group = params.convrot_groupsize if params.convrot else 0
    if params.transposed or group not in blocks.BY_KERNEL:
        return None
    rows, row_scales = quantize_rows(x.reshape(-1, x.shape[-1]).contiguous(), bool(group))
    scales = params.scale.reshape(-1).float().expand(weight.shape[0]).contiguous()
    return int8_linear(rows, row_scales, weight._qdata, scales, bias, out_dtype=x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@register_layout_op(torch.ops.aten.linear.default, GGUFLayout)
def linear(first, args, kwargs):
    x, weight, bias = (*args, None)[:3]
    if not of_blocks(weight) or weight._params.transposed:
        return F.linear(*dequantize_args(args), **dequantize_args(kwargs))
    return product(x, weight, bias)


@register_layout_op(torch.ops.aten.t.default, GGUFLayout)
def transposed(first, args, kwargs):
    params = args[0]._params
    turned = dataclasses.replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(args[0]._qdata, LAYOUT, turned)


@register_layout_op(torch.ops.aten.mm.default, GGUFLayout)
def mm(first, args, kwargs):
    x, weight = args
    if of_blocks(weight) and weight._params.transposed:
        return product(x, weight, None)
    return torch.mm(*dequantize_args(args))


@register_layout_op(torch.ops.aten.addmm.default, GGUFLayout)
def addmm(first, args, kwargs):
    bias, x, weight = args
    if of_blocks(weight) and weight._params.transposed and not kwargs:
        return product(x, weight, bias)
    return torch.addmm(*dequantize_args(args), **dequantize_args(kwargs))
