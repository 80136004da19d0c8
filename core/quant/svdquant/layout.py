"""SVDQuant weights that compute: layouts of comfy_kitchen's QuantizedTensor over its 4-bit operations.

A weight is a list of pieces, flat one behind the other in a few tensors, so that the host moves them as it moves any weight.
int4 runs comfy_kitchen's SVDQuant operations piece by piece; nvfp4 the host's nvfp4 product, with the branch beside it.

The shift of unsigned pieces is undone here (`offset`): `F.linear(x, W, b)` is x W^T + b with the W that `dequantize` gives.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import comfy.model_management
import comfy_kitchen as ck
import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, get_layout_class, register_layout_class, register_layout_op
from comfy_kitchen.float_utils import from_blocked
from comfy_kitchen.tensor import BaseLayoutParams, dequantize_args
from torch import Tensor
from torch.nn import functional as F

from . import tiles
from .stored import HALF, SHIFT, residual

INT4_LAYOUT, NVFP4_LAYOUT = "RepriseSVDQuantInt4Layout", "RepriseSVDQuantNVFP4Layout"
HOST_NVFP4 = "TensorCoreNVFP4Layout"
ROWS = 1024     # that stand in single precision at a time


class Piece(NamedTuple):
    """Sizes of one piece of a weight."""

    rows: int
    columns: int
    rank: int
    unsigned: bool
    tensor_scale: float


@dataclass(frozen=True)
class Params(BaseLayoutParams):
    """scale, smooth, down, up, row_scale: of all pieces, flat. offset [N], or none of it. type: the format's name."""

    type: ClassVar[str]

    smooth: Tensor
    down: Tensor
    up: Tensor
    row_scale: Tensor
    offset: Tensor
    pieces: tuple[Piece, ...]
    axis: int               # 0: above each other, 1: beside each other
    transposed: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """[N, K], transposed or not."""
        rows, columns = [piece.rows for piece in self.pieces], [piece.columns for piece in self.pieces]
        return (sum(rows), columns[0]) if self.axis == 0 else (rows[0], sum(columns))

    def _tensor_fields(self) -> list[str]:
        return ["scale", "smooth", "down", "up", "row_scale", "offset"]


class View(NamedTuple):
    """The tensors of one piece, views of the flat ones."""

    piece: Piece
    codes: Tensor           # int8 [N, K / 2]
    scale: Tensor           # int4: [K / 64, N]; nvfp4: float8, in the order of the host's product
    smooth: Tensor
    down: Tensor
    up: Tensor
    row_scale: Tensor


def views(qdata: Tensor, params: Params, group: int) -> list[View]:
    found, at = [], [0] * 6
    for piece in params.pieces:
        n, k, rank = piece[:3]
        scales = (k // group, n) if group == tiles.GROUP else (n, k // group)
        shapes = ((n, k // 2), scales, (k,), (k, rank), (n, rank), (n,) if params.row_scale.numel() else (0,))
        flat, cut = (qdata, params.scale, params.smooth, params.down, params.up, params.row_scale), []
        for index, (tensor, shape) in enumerate(zip(flat, shapes, strict=True)):
            size = shape[0] * (shape[1] if len(shape) > 1 else 1)
            cut.append(tensor[at[index]:at[index] + size].view(shape))
            at[index] += size
        found.append(View(piece, *cut))
    return found


class SVDQuantLayout(QuantizedLayout):
    """What both kinds share. Each has `product`, one piece's x W^T + bias; and `numbers` and `by_row`, its codes and scales in natural order."""

    QUANTIZES_INPUT = False
    Params: type[Params]
    group: int

    @classmethod
    def quantize(cls, tensor, **options):
        raise NotImplementedError("SVDQuant needs the calibration that its file was made with; such a layer is turned into int8 instead")

    @classmethod
    def get_plain_tensors(cls, qtensor):
        params = qtensor._params
        return qtensor._qdata, params.scale, params.smooth, params.down, params.up, params.row_scale, params.offset

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale}      # of the host's names; such layers are saved as int8

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        weight = torch.empty(params.size, dtype=params.orig_dtype, device=qdata.device)
        row = column = 0
        for view in views(qdata, params, cls.group):
            n, k = view.piece[:2]
            scale, down = cls.by_row(view), view.down.float().t()
            for start in range(0, n, ROWS):
                rows = slice(start, min(start + ROWS, n))
                dense = residual(cls.numbers(view.codes[rows].view(torch.uint8)), scale[rows], view.smooth).mul_(view.piece.tensor_scale)
                if view.row_scale.numel():
                    dense *= view.row_scale[rows, None].float()
                weight[row + rows.start:row + rows.stop, column:column + k] = torch.addmm(dense, view.up[rows].float(), down)
            row, column = (row + n, 0) if params.axis == 0 else (0, column + k)
        return weight

    @classmethod
    def linear(cls, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        params, rows = weight._params, x.reshape(-1, x.shape[-1]).contiguous()
        # the kernels for CUDA take 16-bit numbers alone
        work = torch.bfloat16 if x.is_cuda and x.dtype not in HALF else x.dtype
        rows = rows.to(work)
        if params.offset.numel():
            bias = -params.offset if bias is None else bias.float() - params.offset
        bias = None if bias is None else bias.to(work)
        out, at = [], 0
        for view in views(weight._qdata, params, cls.group):
            n, k = view.piece[:2]
            small = view._replace(smooth=view.smooth.to(work), down=view.down.to(work), up=view.up.to(work))
            if params.axis == 0:
                out.append(cls.product(rows, small, None if bias is None else bias[at:at + n]))
                at += n
            else:
                out.append(cls.product(rows[:, at:at + k].contiguous(), small, None if at else bias))
                at += k
        joined = out[0] if len(out) == 1 else torch.cat(out, 1) if params.axis == 0 else sum(out[1:], out[0])
        return joined.to(x.dtype).view(*x.shape[:-1], params.size[0])


class SVDQuantInt4Layout(SVDQuantLayout):
    """int4 codes, int4 activations: comfy_kitchen's operations."""

    class Params(Params):
        type = "SVDQuant int4"

    MIN_SM_VERSION = (8, 0)
    group = tiles.GROUP

    @staticmethod
    def numbers(codes: Tensor) -> Tensor:
        return tiles.int4(codes)

    @staticmethod
    def by_row(view: View) -> Tensor:
        return view.scale.t()

    @staticmethod
    def product(x: Tensor, view: View, bias: Tensor | None) -> Tensor:
        """By the backend that comfy_kitchen's registry names. Its own layout passes the registry by and takes the CUDA kernels, even
        where the host has switched them off because they were built for a newer CUDA than torch."""
        unsigned = view.piece.unsigned
        codes, scales, branch = ck.quantize_svdquant_w4a4(
            x + SHIFT if unsigned else x, smooth=view.smooth, lora_down=view.down, act_unsigned=unsigned, lora_x=x if unsigned else None)
        return ck.scaled_mm_svdquant_w4a4(
            act=codes, wgt=view.codes, ascales=scales, wscales=view.scale.to(x.dtype), lora_act_in=branch, lora_up=view.up, bias=bias,
            act_unsigned=unsigned)[:len(x)]


class SVDQuantNVFP4Layout(SVDQuantLayout):
    """e2m1 codes with a scale for 16 of them: the host's product where the GPU has it, a product of the unpacked weight elsewhere."""

    class Params(Params):
        type = "SVDQuant nvfp4"

    MIN_SM_VERSION = (10, 0)
    group = tiles.MICRO

    @staticmethod
    def numbers(codes: Tensor) -> Tensor:
        return tiles.e2m1(turned(codes))

    @staticmethod
    def by_row(view: View) -> Tensor:
        rows, columns = view.piece[:2]
        return from_blocked(view.scale.view(torch.uint8), rows, columns // tiles.MICRO).view(view.scale.dtype)

    @staticmethod
    def product(x: Tensor, view: View, bias: Tensor | None) -> Tensor:
        layout = get_layout_class(HOST_NVFP4)
        params = layout.Params(
            scale=torch.full((), view.piece.tensor_scale, device=x.device), orig_dtype=x.dtype, orig_shape=view.piece[:2], block_scale=view.scale)
        weight, smoothed = QuantizedTensor(view.codes.view(torch.uint8), HOST_NVFP4, params), x / view.smooth
        if x.is_cuda and comfy.model_management.supports_nvfp4_compute(x.device):
            smoothed = QuantizedTensor.from_float(smoothed, HOST_NVFP4)
        y = F.linear(smoothed, weight)
        if view.row_scale.numel():
            y = y * view.row_scale.to(y.dtype)
        y = torch.addmm(y, x @ view.down, view.up.t())
        return y if bias is None else y + bias


def turned(codes: Tensor) -> Tensor:
    """Two codes in a byte, the other way round: the host's nvfp4 has the first in the high bits."""
    return codes << 4 | codes >> 4


def _linear(qt, args, kwargs):
    """x W^T + b."""
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    x = x.dequantize() if isinstance(x, QuantizedTensor) else x
    if not isinstance(weight, QuantizedTensor) or weight._params.transposed:
        return F.linear(*dequantize_args((x, weight, bias)))
    return weight.layout_cls.linear(x, weight, bias)


def _t(qt, args, kwargs):
    """What F.linear becomes outside of inference mode is W^T and a product; W^T is a flag."""
    params = qt._params
    turned = replace(params, orig_shape=tuple(reversed(params.orig_shape)), transposed=not params.transposed)
    return QuantizedTensor(qt._qdata, qt._layout_cls, turned)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not isinstance(weight, QuantizedTensor) or not weight._params.transposed:
        x, weight = dequantize_args((x, weight))
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    return _linear(None, (x, _t(weight, (), {}), bias), {})


register_layout_class(INT4_LAYOUT, SVDQuantInt4Layout)
register_layout_class(NVFP4_LAYOUT, SVDQuantNVFP4Layout)
register_layout_op(torch.ops.aten.linear.default, SVDQuantLayout)(_linear)
register_layout_op(torch.ops.aten.t.default, SVDQuantLayout)(_t)
register_layout_op(torch.ops.aten.mm.default, SVDQuantLayout)(lambda qt, args, kwargs: _product(args[0], args[1], None))
register_layout_op(torch.ops.aten.addmm.default, SVDQuantLayout)(lambda qt, args, kwargs: _product(args[1], args[2], args[0]))
