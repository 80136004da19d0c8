"""Between two products of a FLUX block: the gated residual, then the next adaptive layer norm, straight to int8 codes.

    r = x + gate y                                          rounded as the host rounds it, so that r has the host's bits
    codes, scales = int8((layernorm(r) (1 + scale) + shift) H)

y is what attention's or the mlp's last product gave. In the host the tokens go ten and a half times through memory here, in this three and a half.
"""
from torch import Tensor

from . import _residual, _rows
from ._op import operator
from ._rows import activations, chunks, layer_normed, load_row, plus_row, rounded_row, store_codes, store_row, times_row
from ._triton import tl, triton
from .spec import CODES, SCALES, VALUES, Case, Kernel, Limits, nbytes


def gated_residual_int8(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, rotation: bool, eps: float = 1e-6, one_plus: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y: [B, N, C]; gate, scale, shift: [B or 1, 1, C]; all of one type. With `rotation` C is a multiple of 256.

    one_plus: as `modulate` has it.

    Returns r [B, N, C] in the type of x, codes, int8 [B, N, C], and scales, fp32 [B, N, 1].
    What overflows fp16 is left infinite, as the sum itself leaves it.
    """
    _residual.checked(x, y, {"gate": gate, "scale": scale, "shift": shift}, rotation)
    return OP(x, y, gate, scale, shift, rotation, eps, one_plus)


# plain torch: the definition of right ----------------------------------------------------------------------------------
def reference(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, rotation: bool, eps: float, one_plus: bool) -> tuple[Tensor, Tensor, Tensor]:
    residual = (x + gate * y).contiguous()
    return residual, *_rows.quantized(_rows.layer_norm(residual, eps) * _rows.multiplier(scale, one_plus) + shift.float(), rotation)


# Triton ----------------------------------------------------------------------------------------------------------------
@triton.jit
def _gated_residual_kernel(
    x, y, gate, scale, shift, residual, codes, scales,
    channels, x_batch, x_token, y_batch, y_token, gate_batch, scale_batch, shift_batch, eps,
    ONE_PLUS: tl.constexpr, ROTATION: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number = batch * tl.num_programs(0) + token
    TYPE: tl.constexpr = x.dtype.element_ty

    row = load_row(y + (batch * y_batch + token * y_token), channels, PIECES, PIECE)
    row = rounded_row(times_row(row, gate + batch * gate_batch, channels, 0, PIECES, PIECE), TYPE, PIECES)
    row = rounded_row(plus_row(row, x + (batch * x_batch + token * x_token), channels, PIECES, PIECE), TYPE, PIECES)
    store_row(row, residual + number * channels, channels, PIECES, PIECE)

    row = layer_normed(row, channels, eps, PIECES, PIECE)
    row = times_row(row, scale + batch * scale_batch, channels, ONE_PLUS, PIECES, PIECE)
    row = plus_row(row, shift + batch * shift_batch, channels, PIECES, PIECE)
    store_codes(row, codes, scales, number, channels, ROTATION, PIECES, PIECE)


def fused(x, y, gate, scale, shift, rotation: bool, eps: float, one_plus: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _residual.launched(_gated_residual_kernel, x, y, gate, scale, shift, rotation=rotation, eps=eps, one_plus=one_plus)


def fits(x, y, gate, scale, shift, **_) -> bool:
    return gate.dtype is x.dtype and _rows.fits(x.shape[-1], x, y, gate, scale, shift)


def fake(x, y, gate, scale, shift, rotation, eps, one_plus) -> tuple[Tensor, Tensor, Tensor]:
    return _residual.results(x)


OP = operator("gated_residual_int8", reference, fused, fake, fits)


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def inputs(shape, rotation: bool, one_plus: bool = True, *, dtype, device) -> dict:
    gate, shift, scale = chunks(shape, 3, dtype=dtype, device=device)
    x, y = (activations(shape, dtype=dtype, device=device) for _ in range(2))
    return {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift, "rotation": rotation, "eps": 1e-6, "one_plus": one_plus}


def traffic(x, y, gate, scale, shift, rotation, eps, one_plus) -> int:
    return 2 * nbytes(x) + nbytes(y, gate, scale, shift) + _rows.coded_bytes(x, x.shape[-1])


GATED_RESIDUAL_INT8 = Kernel(
    name="gated residual to int8", reference=reference, fused=fused, inputs=inputs, traffic=traffic, op=OP,
    outputs=(VALUES, CODES, SCALES), limits=Limits(registers=64),
    cases=(
        Case("odd", (2, 3, 63), rotation=False, one_plus=False),
        Case("beyond a power of two", (1, 5, 1030), rotation=False),
        Case("one group", (2, 3, 256), rotation=True),
        Case("FLUX, few tokens", (2, 2, 3072), rotation=True),
        Case("FLUX 1024px", (1, 4352, 3072), rotation=True),
    ),
)
