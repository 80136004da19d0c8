"""A layer in another of the host's formats, a few rows at a time.

    int8:  W' = W H (H: Hadamard blocks, an orthogonal rotation of groups of inputs),  q = round(W' / s),  s = max|row| / 127
    fp8:   q = W / s,  s = max|W| / 448
    nvfp4: q = W / (s t),  s for each 16 inputs in fp8, t for the layer

The work is comfy_kitchen's; a row is whole in each piece, so that pieces give the bits that the whole layer would.
"""
import torch
from comfy.quant_ops import get_layout_class
from torch import Tensor

from .blocks import rotation_group
from .formats.fp8 import marker
from .layer import Layer

LARGEST = 448.0             # of float8_e4m3fn


def int8_mark(group: int) -> Tensor:
    """The host's mark of a layer in int8, rotated in groups of so many inputs; 0 for none."""
    return marker(format="int8_tensorwise", **turned(group))


def turned(group: int) -> dict:
    """A rotation as the host's marks and layouts have it."""
    return {"convrot": True, "convrot_groupsize": group} if group else {}


def int8(layer: Layer, device: torch.device | str = "cpu", progress=lambda weights: None) -> dict[str, Tensor]:
    """The layer as `int8_tensorwise` with a scale for each row, under the host's suffixes. On the CPU, worked out on `device`."""
    rows, columns = layer.shape
    group, layout = rotation_group(columns), get_layout_class("TensorWiseINT8Layout")
    codes, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, 1)
    for start, stop in layer.pieces():
        q, params = layout.quantize(layer.rows(start, stop, device=device), is_weight=True, per_channel=True, **turned(group))
        codes[start:stop].copy_(q)
        scales[start:stop].copy_(params.scale.reshape(-1, 1))
        progress((stop - start) * columns)
    return {".weight": codes, ".weight_scale": scales, ".comfy_quant": int8_mark(group)}


def fp8(layer: Layer, device: torch.device | str = "cpu", progress=lambda weights: None) -> dict[str, Tensor]:
    """The layer as `float8_e4m3fn` with one scale."""
    dtype, layout = torch.float8_e4m3fn, get_layout_class("TensorCoreFP8E4M3Layout")
    largest = torch.zeros((), device=device)
    for start, stop in layer.pieces():
        largest = torch.maximum(largest, layer.rows(start, stop, device=device).abs().amax())
    scale = (largest / LARGEST).clamp_min(1e-30)
    codes = torch.empty(layer.shape, dtype=dtype)
    for start, stop in layer.pieces():
        codes[start:stop].copy_(layout.quantize(layer.rows(start, stop, device=device), scale=scale)[0])
        progress((stop - start) * layer.shape[1])
    return {".weight": codes, ".weight_scale": scale.to("cpu"), ".comfy_quant": marker(format="float8_e4m3fn")}


def nvfp4(layer: Layer, device: torch.device | str = "cpu", progress=lambda weights: None) -> dict[str, Tensor]:
    """The layer as `nvfp4`. Its scales are stored in tiles of the whole layer, so that this one is worked on as a whole, in bf16."""
    weight = torch.cat([layer.rows(start, stop, torch.bfloat16, device) for start, stop in layer.pieces()])
    codes, params = get_layout_class("TensorCoreNVFP4Layout").quantize(weight)
    progress(layer.shape[0] * layer.shape[1])
    return {".weight": codes.to("cpu"), ".weight_scale": params.block_scale.to("cpu"), ".weight_scale_2": params.scale.to("cpu"),
            ".comfy_quant": marker(format="nvfp4")}


TRANSCODERS = {"int8": int8, "fp8": fp8, "nvfp4": nvfp4}
BITS = {"int8": 8.0, "fp8": 8.0, "nvfp4": 4.5, "full": 16.0}      # of a weight, as memory holds it


def can(target: str, shape: tuple[int, int]) -> bool:
    """Whether a layer of this shape can become that."""
    return target != "nvfp4" or (shape[0] % 16 == 0 and shape[1] % 16 == 0)


def unpacked(layer: Layer, dtype: torch.dtype, device: torch.device | str = "cpu", progress=lambda weights: None) -> dict[str, Tensor]:
    """The layer at full precision."""
    weight = torch.empty(layer.shape, dtype=dtype)
    for start, stop in layer.pieces():
        weight[start:stop].copy_(layer.rows(start, stop, dtype=dtype, device=device))
        progress((stop - start) * layer.shape[1])
    return {".weight": weight}
