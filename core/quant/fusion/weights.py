"""The host's weights as the kernels take them."""
from __future__ import annotations

import comfy.ops
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor

from ....kernels._hadamard import GROUP
from .. import blocks
from ..packed import LAYOUT as PACKED
from ..packed_ops import LAYOUT
from .scope import Int8

FORMATS = {algorithm["comfy_tensor_layout"]: name for name, algorithm in QUANT_ALGOS.items()}
STEP = 16       # the int8 product reads rows in pieces of so many codes


def int8(weight) -> Int8 | str:
    """The weight, cast and patched by the host, as an int8 product takes it; else why not, in a few words. GGUF's blocks become codes here."""
    if not isinstance(weight, QuantizedTensor):
        return f"in {str(weight.dtype).removeprefix('torch.')}"
    params, codes = weight._params, weight._qdata
    if getattr(params, "transposed", False) or weight._layout_cls not in (LAYOUT, PACKED):
        return f"in {FORMATS.get(weight._layout_cls, weight._layout_cls.removeprefix('Reprise').removesuffix('Layout'))}"
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


def of_norm(module, like: Tensor) -> Tensor:
    """A norm's weight as its own forward would take it for `like`: cast and patched where that casts.

    It stays what it is. What the host streams lies in one of two buffers, and the second cast from now writes over it; so it is copied,
    a few KB, and given back at once.
    """
    if not (getattr(module, "comfy_cast_weights", False) or getattr(module, "weight_function", None) or getattr(module, "bias_function", None)):
        return module.weight
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    try:
        resident = weight.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()
        return weight if resident else weight.clone()
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)
