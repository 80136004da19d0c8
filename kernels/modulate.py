"""Adaptive norm: one pass over the tokens where the host makes two or three, and as many again to quantize what comes out.

    y = norm(x) w (1 + scale) + shift               norm: layer norm, or RMS norm; w and shift may be missing
    codes, scales = int8(y H)                       `modulate_int8`: y itself goes nowhere

In front of the first product of a FLUX block (layer norm, shift) and of a Z-Image block (RMS norm, w, no shift). Sums are in fp32
and rounded once, where the host rounds the norm, 1 + scale and the product each.
"""
import torch
from torch import Tensor

from . import _rows
from ._op import operator
from ._rows import activations, batch_stride, chunks, layer_normed, load_row, pieces, plus_row, rms_normed, store_codes, store_row, times_row
from ._triton import tl, triton
from .spec import CODES, SCALES, Case, Kernel, Limits, nbytes


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, weight: Tensor | None = None, *, rms: bool = False, eps: float = 1e-6,
    one_plus: bool = True,
) -> Tensor:
    """x: [B, N, C]; scale, shift: [B or 1, 1, C]; weight: [C]. Returns y [B, N, C] in the type of x, contiguous.

    one_plus: the 1 is still to be added to the scale. The pack passes False, as the host has added it where it multiplies.

    comfy_kitchen's `adaln` and `rms_adaln` do this too, but for the weight; call them where their CUDA backend works.
    """
    checked(x, scale, shift, weight)
    return OP(x, scale, shift, weight, rms, eps, one_plus)


def modulate_int8(
    x: Tensor, scale: Tensor, shift: Tensor | None = None, weight: Tensor | None = None, *, rotation: bool, rms: bool = False, eps: float = 1e-6,
    one_plus: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `modulate`, quantized: codes, int8 [B, N, C], and scales, fp32 [B, N, 1]. With `rotation` C is a multiple of 256."""
    checked(x, scale, shift, weight, rotation)
    return OP_INT8(x, scale, shift, weight, rotation, rms, eps, one_plus)


def checked(x, scale, shift, weight, rotation: bool = False) -> None:
    _rows.checked(x, {"scale": scale, "shift": shift}, rotation)
    _rows.checked_weight(weight, x.shape[-1])


# plain torch: the definition of right ----------------------------------------------------------------------------------
def modulated(x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None, rms: bool, eps: float, one_plus: bool) -> Tensor:
    """In fp32."""
    y = _rows.rms_norm(x, None, eps) if rms else _rows.layer_norm(x, eps)
    if weight is not None:
        y = y * weight.float()
    y = y * _rows.multiplier(scale, one_plus)
    return y if shift is None else y + shift.float()


def reference(x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None, rms: bool, eps: float, one_plus: bool) -> Tensor:
    return modulated(x, scale, shift, weight, rms, eps, one_plus).to(x.dtype).contiguous()


def reference_int8(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None, rotation: bool, rms: bool, eps: float, one_plus: bool,
) -> tuple[Tensor, Tensor]:
    return _rows.quantized(modulated(x, scale, shift, weight, rms, eps, one_plus), rotation)


# Triton ----------------------------------------------------------------------------------------------------------------
@triton.jit
def _modulate_kernel(
    x, scale, shift, weight, y, codes, scales,      # y, or codes and scales
    channels, x_batch, x_token, scale_batch, shift_batch, eps,
    RMS: tl.constexpr, ONE_PLUS: tl.constexpr, ROTATION: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number = batch * tl.num_programs(0) + token

    row = load_row(x + (batch * x_batch + token * x_token), channels, PIECES, PIECE)
    if RMS:
        row = rms_normed(row, channels, eps, PIECES)
    else:
        row = layer_normed(row, channels, eps, PIECES, PIECE)
    if weight is not None:
        row = times_row(row, weight, channels, 0, PIECES, PIECE)
    row = times_row(row, scale + batch * scale_batch, channels, ONE_PLUS, PIECES, PIECE)
    if shift is not None:
        row = plus_row(row, shift + batch * shift_batch, channels, PIECES, PIECE)

    if y is None:
        store_codes(row, codes, scales, number, channels, ROTATION, PIECES, PIECE)
    else:
        store_row(row, y + number * channels, channels, PIECES, PIECE)


def launch(x, scale, shift, weight, y, codes, scales, rotation: bool, rms: bool, eps: float, one_plus: bool) -> None:
    batch, tokens, channels = x.shape
    with torch.cuda.device_of(x):
        _modulate_kernel[(tokens, batch)](
            x, scale, shift, weight, y, codes, scales, channels, x.stride(0), x.stride(1), batch_stride(scale), batch_stride(shift), eps,
            RMS=rms, ONE_PLUS=int(one_plus), ROTATION=rotation, **pieces(channels, x.element_size()))


def fused(x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None, rms: bool, eps: float, one_plus: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(x, scale, shift, weight, y, None, None, False, rms, eps, one_plus)
    return y


def fused_int8(x, scale, shift, weight, rotation: bool, rms: bool, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _rows.codes_like(x, x.shape[-1])
    launch(x, scale, shift, weight, None, codes, scales, rotation, rms, eps, one_plus)
    return codes, scales


def fits(x, scale, shift, weight, **_) -> bool:
    return _rows.fits(x.shape[-1], x, scale, shift, weight)


def fake(x, scale, shift, weight, rms, eps, one_plus) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def fake_int8(x, scale, shift, weight, rotation, rms, eps, one_plus) -> tuple[Tensor, Tensor]:
    return _rows.codes_like(x, x.shape[-1])


OP = operator("modulate", reference, fused, fake, fits)
OP_INT8 = operator("modulate_int8", reference_int8, fused_int8, fake_int8, fits)


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def inputs(shape, rms: bool = False, weight: bool = False, shift: bool = True, one_plus: bool = True, *, dtype, device) -> dict:
    """FLUX unless told: scale and shift are parts of what one product gave, and the batches' rows lie apart."""
    shifts, scales, _ = chunks(shape, 3, dtype=dtype, device=device)
    return {
        "x": activations(shape, dtype=dtype, device=device), "scale": scales, "shift": shifts if shift else None,
        "weight": (1 + 0.2 * torch.randn(shape[-1], device=device)).to(dtype) if weight else None, "rms": rms, "eps": 1e-6,
        "one_plus": one_plus}


def int8_inputs(shape, rotation: bool, *, dtype, device, **sizes) -> dict:
    return inputs(shape, **sizes, dtype=dtype, device=device) | {"rotation": rotation}


def traffic(x, scale, shift, weight, rms, eps, one_plus) -> int:
    return 2 * nbytes(x) + nbytes(scale, shift, weight)


def int8_traffic(x, scale, shift, weight, rotation, rms, eps, one_plus) -> int:
    return nbytes(x, scale, shift, weight) + _rows.coded_bytes(x, x.shape[-1])


MODULATE = Kernel(
    name="modulate", reference=reference, fused=fused, inputs=inputs, traffic=traffic, op=OP, limits=Limits(registers=64),
    cases=(
        Case("one channel", (2, 3, 1)),
        Case("beyond a power of two", (1, 5, 1030)),
        Case("RMS, all, odd", (2, 3, 77), rms=True, weight=True, one_plus=False),
        Case("FLUX, few tokens", (1, 3, 3072)),
        Case("FLUX 1024px", (1, 4352, 3072)),
        Case("Z-Image 1024px", (1, 4192, 3840), rms=True, weight=True, shift=False),
    ),
)

MODULATE_INT8 = Kernel(
    name="modulate to int8", reference=reference_int8, fused=fused_int8, inputs=int8_inputs, traffic=int8_traffic, op=OP_INT8,
    outputs=(CODES, SCALES), limits=Limits(registers=64),
    cases=(
        Case("beyond a power of two", (1, 5, 1030), rotation=False),
        Case("RMS, all, odd", (2, 3, 77), rotation=False, rms=True, weight=True, one_plus=False),
        Case("one group", (2, 3, 256), rotation=True),
        Case("FLUX, few tokens", (1, 3, 3072), rotation=True),
        Case("Z-Image, few tokens", (2, 2, 3840), rotation=True, rms=True, weight=True, shift=False),
        Case("FLUX 1024px", (1, 4352, 3072), rotation=True),
        Case("Z-Image 1024px", (1, 4192, 3840), rotation=True, rms=True, weight=True, shift=False),
    ),
)
