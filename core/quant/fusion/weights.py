"""The host's weights as the kernels take them."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ....kernels._hadamard import GROUP
from .. import blocks
from ..packed import LAYOUT as PACKED
from .scope import Int8

LAYOUT = "TensorWiseINT8Layout"
STEP = 16       # the int8 product reads rows in pieces of so many codes


def int8(weight) -> Int8 | str:
    """The weight, cast and patched by the host, as an int8 product takes it; else why not, in a few words. GGUF's blocks become codes here."""
    if not isinstance(weight, QuantizedTensor):
        return f"in {str(weight.dtype).removeprefix('torch.')}"
    params, codes = weight._params, weight._qdata
    if getattr(params, "transposed", False) or weight._layout_cls not in (LAYOUT, PACKED):
        return f"in {weight._layout_cls}"
    if weight._layout_cls == PACKED:
        if params.compute != "int8" or params.group not in blocks.BY_KERNEL:
            return "in GGUF blocks that are computed as floats"
        codes = blocks.codes(codes.contiguous(), params.type, params.scale, params.group)
    elif params.convrot and params.convrot_groupsize != GROUP:
        return f"rotated in groups of {params.convrot_groupsize}"
    if codes.ndim != 2 or codes.shape[1] % STEP or not codes.is_contiguous() or params.scale.numel() not in (1, len(codes)):
        return "of sizes that the kernel does not take"
    scales = params.scale.reshape(-1, 1).float()
    return Int8(codes, scales.expand(len(codes), 1).contiguous(), bool(params.convrot))


@contextmanager
def of_norm(module, like: Tensor) -> Iterator[Tensor]:
    """A norm's weight on the device and in the type of `like`, patched, for the length of a call."""
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    try:
        yield weight
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)
