"""GGUF blocks as numbers: as floats, as int8 codes for a product, and the scales of those codes.

    codes = round(W H / scales)         H: comfy_kitchen's rotation ("convrot") over groups of `group` channels, none where that is 0
"""
import gguf
import torch
from comfy_kitchen.tensor import TensorWiseINT8Layout
from torch import Tensor

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K")
GROUPS = (256, 64, 16)      # of the rotation, the first that divides the rows
CHUNK = 8 << 20             # weights that stand in single precision at a time: 32 MiB


def rotation_group(columns: int) -> int:
    """The group that rows of so many channels are rotated in, 0 for none."""
    return next((group for group in GROUPS if columns % group == 0), 0)


def values(blocks: Tensor, type: str) -> Tensor:
    """blocks: uint8 [n, bytes of a row]. Returns fp32 [n, K]."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.cpu().numpy(), gguf.GGMLQuantizationType[type])).to(blocks.device)


def quantized(weight: Tensor, group: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """weight: float [N, K]. Returns codes, int8 [N, K], and their scales, fp32 [N, 1], by comfy_kitchen; rounded at random under a seed."""
    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=bool(group), convrot_groupsize=group or 256,
                                                  stochastic_rounding=seed or 0)
    return codes, params.scale


def pieces(blocks: Tensor, columns: int) -> list[Tensor]:
    """The rows, some at a time, so that no layer stands whole in single precision."""
    return list(blocks.split(max(1, CHUNK // columns)))


def scales(blocks: Tensor, type: str, columns: int, group: int, device: torch.device) -> Tensor:
    """The scale of each row's codes, fp32 [N, 1] where the blocks are; found on `device`."""
    return torch.cat([quantized(values(piece.to(device), type), group)[1].to(blocks.device) for piece in pieces(blocks, columns)])


def codes(blocks: Tensor, type: str, scales: Tensor, group: int) -> Tensor:
    """blocks: uint8 [N, bytes of a row]. Returns int8 [N, K] under the scales that `scales` gave."""
    return quantized(values(blocks, type), group)[0]
