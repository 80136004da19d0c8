"""GGUF blocks as numbers: as floats, as int8 codes for a product, and the scales of those codes.

    codes = round(W H / scales)         H: comfy_kitchen's rotation ("convrot") over groups of `group` channels, none where that is 0
"""
import torch
from comfy_kitchen.tensor import TensorWiseINT8Layout
from torch import Tensor

from ...kernels.gguf import BLOCKS
from ...kernels.gguf_weights import gguf_codes, gguf_row_scales, gguf_values
from .layer import CHUNK

TYPES = tuple(BLOCKS)
GROUPS = (256, 64, 16)      # of the rotation, the first that divides the rows
BY_KERNEL = (256, 0)        # the others are for narrow layers, and rotated by comfy_kitchen
EXPONENT = 0x7c00           # of fp16


def rotation_group(columns: int) -> int:
    """The group that rows of so many channels are rotated in, 0 for none."""
    return next((group for group in GROUPS if columns % group == 0), 0)


def values(blocks: Tensor, type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """blocks: uint8 [n, bytes of a row]. Returns [n, K]."""
    return gguf_values(blocks, type, dtype)


def without_scale(blocks: Tensor, type: str) -> int:
    """How many blocks have a scale that is no number. Of each block its scales alone are read: fp16 is no number where every bit of its exponent is set."""
    form = BLOCKS[type]
    words = blocks.reshape(-1, form.bytes).view(torch.int16)
    first, *more = (words[:, start // 2] & EXPONENT == EXPONENT for start in form.halves)
    for bad in more:
        first |= bad
    return int(first.count_nonzero())


def quantized(weight: Tensor, group: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """weight: float [N, K]. Returns codes, int8 [N, K], and their scales, fp32 [N, 1], by comfy_kitchen; rounded at random under a seed."""
    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=bool(group), convrot_groupsize=group or 256,
                                                  stochastic_rounding=seed or 0)
    return codes, params.scale


def scales(blocks: Tensor, type: str, group: int, device: torch.device) -> Tensor:
    """The scale of each row's codes, fp32 [N, 1] where the blocks are; found on `device`, some rows at a time."""
    rows = max(1, CHUNK // BLOCKS[type].columns(blocks))
    return torch.cat([row_scales(piece.to(device), type, group).to(blocks.device) for piece in blocks.split(rows)])


def row_scales(blocks: Tensor, type: str, group: int) -> Tensor:
    if group in BY_KERNEL:
        return gguf_row_scales(blocks, type, bool(group))
    return quantized(values(blocks, type), group)[1]


def codes(blocks: Tensor, type: str, scales: Tensor, group: int) -> Tensor:
    """blocks: uint8 [N, bytes of a row]; scales: fp32 [N, 1], from `scales`. Returns int8 [N, K]."""
    if group in BY_KERNEL:
        return gguf_codes(blocks, scales, type, bool(group))
    return quantized(values(blocks, type), group)[0]
