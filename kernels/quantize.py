"""Rows to int8 codes and a scale each, with and without the rotation: what an int8 product takes.

    codes, scales = int8(x H)

For activations that no kernel before them has quantized already, in front of `int8_linear`. Where comfy_kitchen's CUDA backend works
its `int8_linear` does both at once and is called instead; that backend is off with torch builds for CUDA 12.
"""
import torch
from torch import Tensor

from . import _rows
from ._op import operator
from ._rows import codes_like, load_row, pieces, quantized, store_codes, whole_groups
from ._triton import tl, triton
from .spec import CODES, SCALES, Case, Kernel, Limits


def quantize_rows(x: Tensor, rotation: bool) -> tuple[Tensor, Tensor]:
    """x: [..., K], with `rotation` K a multiple of 256. Returns codes, int8 [..., K], and scales, fp32 [..., 1]."""
    whole_groups(x.shape[-1], rotation)
    return OP(x, rotation)


# plain torch: the definition of right ----------------------------------------------------------------------------------
def reference(x: Tensor, rotation: bool) -> tuple[Tensor, Tensor]:
    return quantized(x.float(), rotation)


def fake(x: Tensor, rotation: bool) -> tuple[Tensor, Tensor]:
    return codes_like(x, x.shape[-1])


# Triton ----------------------------------------------------------------------------------------------------------------
@triton.jit
def _quantize_kernel(x, codes, scales, channels, ROTATION: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    store_codes(load_row(x + number * channels, channels, PIECES, PIECE), codes, scales, number, channels, ROTATION, PIECES, PIECE)


def fits(x: Tensor, rotation: bool) -> bool:
    return x.is_contiguous() and _rows.fits(x.shape[-1], x)


def fused(x: Tensor, rotation: bool) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, for what `fits`."""
    codes, scales = fake(x, rotation)
    channels = x.shape[-1]
    with torch.cuda.device_of(x):
        _quantize_kernel[(x.numel() // channels,)](x, codes, scales, channels, ROTATION=rotation, **pieces(channels, x.element_size()))
    return codes, scales


OP = operator("quantize_rows", reference, fused, fake, fits)


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def inputs(shape, rotation: bool, *, dtype, device) -> dict:
    """Rows with a few channels far larger than the rest, as activations have them."""
    x = torch.randn(shape, dtype=torch.float32, device=device)
    x[..., ::97] *= 20
    return {"x": x.to(dtype), "rotation": rotation}


def traffic(x: Tensor, rotation: bool) -> int:
    return x.nbytes + x.numel() + 4 * (x.numel() // x.shape[-1])


QUANTIZE_ROWS = Kernel(
    name="quantize rows", reference=reference, fused=fused, inputs=inputs, traffic=traffic, op=OP,
    outputs=(CODES, SCALES), limits=Limits(registers=64),
    cases=(
        Case("one channel", (3, 1), rotation=False),
        Case("odd", (2, 3, 63), rotation=False),
        Case("beyond a power of two", (5, 1030), rotation=False),
        Case("one group", (1, 256), rotation=True),
        Case("three groups", (7, 768), rotation=True),
        Case("FLUX hidden, few rows", (3, 3072), rotation=True),
        Case("FLUX mlp, one row", (1, 15360), rotation=True),
        Case("FLUX hidden 1024px", (1, 4352, 3072), rotation=True),
        Case("FLUX mlp 1024px", (1, 4352, 15360), rotation=True),
        Case("FLUX.2 linear2 1024px", (1, 4608, 24576), rotation=True),
        Case("Z-Image hidden 1024px", (1, 4192, 3840), rotation=True),
    ),
)
