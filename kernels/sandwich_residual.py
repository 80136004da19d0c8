"""Between two products of a Z-Image block: norm and gate of what came, the residual, then the next norm, straight to int8 codes.

    r = x + gate (rmsnorm(y) v)                             rounded as the host rounds it, so that r has the host's bits
    codes, scales = int8((rmsnorm(r) w (1 + scale)) H)

y is what attention's or the feed forward's last product gave, gate the tanh of the modulation's. A norm on both sides of each of
these is called a sandwich norm. In the host the tokens go twelve and a half times through memory here, in this three and a half.
"""
import torch
from torch import Tensor

from . import _residual, _rows
from ._op import operator
from ._rows import activations, chunks, load_row, plus_row, rms_normed, rounded_row, store_codes, store_row, times_row
from ._triton import tl, triton
from .spec import CODES, SCALES, VALUES, Case, Kernel, Limits, nbytes


def sandwich_residual_int8(
    x: Tensor, y: Tensor, gate: Tensor, after: Tensor, before: Tensor, scale: Tensor, *, rotation: bool, eps: float = 1e-5, one_plus: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y: [B, N, C]; gate, its tanh taken, and scale: [B or 1, 1, C]; after (v), before (w): [C]; all of one type.

    one_plus: as `modulate` has it. With `rotation` C is a multiple of 256.
    Returns r [B, N, C] in the type of x, codes, int8 [B, N, C], and scales, fp32 [B, N, 1].
    """
    _residual.checked(x, y, {"gate": gate, "scale": scale}, rotation)
    _rows.checked_weight(after, x.shape[-1])
    _rows.checked_weight(before, x.shape[-1])
    return OP(x, y, gate, after, before, scale, rotation, eps, one_plus)


# plain torch: the definition of right ----------------------------------------------------------------------------------
def reference(
    x: Tensor, y: Tensor, gate: Tensor, after: Tensor, before: Tensor, scale: Tensor, rotation: bool, eps: float, one_plus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    residual = (x + gate * _rows.rms_norm(y, after, eps).to(x.dtype)).contiguous()
    return residual, *_rows.quantized(_rows.rms_norm(residual, before, eps) * _rows.multiplier(scale, one_plus), rotation)


# Triton ----------------------------------------------------------------------------------------------------------------
@triton.jit
def _sandwich_residual_kernel(
    x, y, gate, after, before, scale, residual, codes, scales,
    channels, x_batch, x_token, y_batch, y_token, gate_batch, scale_batch, eps,
    ONE_PLUS: tl.constexpr, ROTATION: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number = batch * tl.num_programs(0) + token
    TYPE: tl.constexpr = x.dtype.element_ty

    row = rms_normed(load_row(y + (batch * y_batch + token * y_token), channels, PIECES, PIECE), channels, eps, PIECES)
    row = rounded_row(times_row(row, after, channels, 0, PIECES, PIECE), TYPE, PIECES)
    row = rounded_row(times_row(row, gate + batch * gate_batch, channels, 0, PIECES, PIECE), TYPE, PIECES)
    row = rounded_row(plus_row(row, x + (batch * x_batch + token * x_token), channels, PIECES, PIECE), TYPE, PIECES)
    store_row(row, residual + number * channels, channels, PIECES, PIECE)

    row = times_row(rms_normed(row, channels, eps, PIECES), before, channels, 0, PIECES, PIECE)
    row = times_row(row, scale + batch * scale_batch, channels, ONE_PLUS, PIECES, PIECE)
    store_codes(row, codes, scales, number, channels, ROTATION, PIECES, PIECE)


def fused(x, y, gate, after, before, scale, rotation: bool, eps: float, one_plus: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _residual.launched(_sandwich_residual_kernel, x, y, gate, after, before, scale, rotation=rotation, eps=eps, one_plus=one_plus)


def fits(x, y, gate, after, before, scale, **_) -> bool:
    return gate.dtype is after.dtype is x.dtype and _rows.fits(x.shape[-1], x, y, gate, after, before, scale)


def fake(x, y, gate, after, before, scale, rotation, eps, one_plus) -> tuple[Tensor, Tensor, Tensor]:
    return _residual.results(x)


OP = operator("sandwich_residual_int8", reference, fused, fake, fits)


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def inputs(shape, rotation: bool, one_plus: bool = True, *, dtype, device) -> dict:
    gate, scale, _, _ = chunks(shape, 4, dtype=dtype, device=device)
    x, y = (activations(shape, dtype=dtype, device=device) for _ in range(2))
    after, before = ((1 + 0.2 * torch.randn(shape[-1], device=device)).to(dtype) for _ in range(2))
    return {"x": x, "y": y, "gate": gate.tanh(), "after": after, "before": before, "scale": scale, "rotation": rotation, "eps": 1e-5, "one_plus": one_plus}


def traffic(x, y, gate, after, before, scale, rotation, eps, one_plus) -> int:
    return 2 * nbytes(x) + nbytes(y, gate, after, before, scale) + _rows.coded_bytes(x, x.shape[-1])


SANDWICH_RESIDUAL_INT8 = Kernel(
    name="sandwich residual to int8", reference=reference, fused=fused, inputs=inputs, traffic=traffic, op=OP,
    outputs=(VALUES, CODES, SCALES), limits=Limits(registers=64),
    cases=(
        Case("odd", (2, 3, 63), rotation=False, one_plus=False),
        Case("beyond a power of two", (1, 5, 1030), rotation=False),
        Case("one group", (2, 3, 256), rotation=True),
        Case("Z-Image, few tokens", (2, 2, 3840), rotation=True),
        Case("Z-Image 1024px", (1, 4192, 3840), rotation=True),
    ),
)
