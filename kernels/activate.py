"""The activation of an mlp, straight to the int8 codes that its last product takes, beside attention's output where that shares the product.

    codes, scales = int8([attention,] gelu(a) H)            FLUX: the mlp of a double-stream block; linear2 of a single-stream block
    codes, scales = int8([attention,] silu(a) b H)          Z-Image's feed forward; FLUX.2

gelu by tanh. comfy_kitchen's `int8_linear(input_act=...)` does the same for one tensor that holds a and b and nothing beside, where its
CUDA backend works; what is joined with something, or in two tensors, the host writes out and copies together first.
"""
import torch
from torch import Tensor

from . import _rows
from ._gelu import gelu_tanh
from ._op import operator
from ._rows import activations, pieces, store_codes
from ._triton import tl, triton
from .spec import CODES, SCALES, Case, Kernel, Limits, nbytes


def activate_int8(a: Tensor, b: Tensor | None = None, attention: Tensor | None = None, *, rotation: bool) -> tuple[Tensor, Tensor]:
    """a, b: [B, N, C], with b silu(a) b, else gelu(a); attention: [B, N, A], whose channels come first.

    With `rotation` A + C is a multiple of 256. Returns codes, int8 [B, N, A + C], and scales, fp32 [B, N, 1].
    """
    if b is not None and b.shape != a.shape:
        raise ValueError(f"a {tuple(a.shape)} came with b {tuple(b.shape)}; pass two of one shape")
    if attention is not None and attention.shape[:-1] != a.shape[:-1]:
        raise ValueError(f"a {tuple(a.shape)} came with attention {tuple(attention.shape)}; pass two of the same tokens")
    _rows.checked(a, {})
    _rows.whole_groups(width(a, attention), rotation)
    return OP(a, b, attention, rotation)


def width(a: Tensor, attention: Tensor | None) -> int:
    return a.shape[-1] + (0 if attention is None else attention.shape[-1])


# plain torch: the definition of right ----------------------------------------------------------------------------------
def reference(a: Tensor, b: Tensor | None, attention: Tensor | None, rotation: bool) -> tuple[Tensor, Tensor]:
    y = torch.nn.functional.gelu(a.float(), approximate="tanh") if b is None else torch.nn.functional.silu(a.float()) * b.float()
    return _rows.quantized(y if attention is None else torch.cat((attention.float(), y), -1), rotation)


# Triton ----------------------------------------------------------------------------------------------------------------
@triton.jit
def silu(b_a):
    return b_a / (1.0 + tl.exp2(-1.4426950408889634 * b_a))


@triton.jit
def _activate_kernel(
    a, b, attention, codes, scales,
    channels, attention_channels, a_batch, a_token, b_batch, b_token, attention_batch, attention_token,
    ROTATION: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    number = batch * tl.num_programs(0) + token
    every = attention_channels + channels
    # from where channel `attention_channels` is the first of a, and of b
    a += batch * a_batch + token * a_token - attention_channels
    if b is not None:
        b += batch * b_batch + token * b_token - attention_channels

    row = ()
    for i in tl.static_range(PIECES):
        # [PIECE]
        at = i * PIECE + tl.arange(0, PIECE).to(tl.int64)
        own = at < every
        if attention is not None:
            own = own & (at >= attention_channels)
        b_y = tl.load(a + at, mask=own, other=0.0).to(tl.float32)
        if b is None:
            b_y = gelu_tanh(b_y)
        else:
            b_y = silu(b_y) * tl.load(b + at, mask=own, other=0.0).to(tl.float32)
        if attention is not None:
            beside = attention + (batch * attention_batch + token * attention_token)
            b_y += tl.load(beside + at, mask=at < attention_channels, other=0.0).to(tl.float32)
        row = row + (b_y,)
    store_codes(row, codes, scales, number, every, ROTATION, PIECES, PIECE)


def fused(a, b, attention, rotation: bool) -> tuple[Tensor, Tensor]:
    codes, scales = fake(a, b, attention, rotation)
    batch, tokens, channels = a.shape
    strides = [stride for tensor in (a, b, attention) for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]
    with torch.cuda.device_of(a):
        _activate_kernel[(tokens, batch)](
            a, b, attention, codes, scales, channels, codes.shape[-1] - channels, *strides, ROTATION=rotation, **pieces(codes.shape[-1], a.element_size()))
    return codes, scales


def fits(a, b, attention, **_) -> bool:
    return _rows.fits(width(a, attention), a, b, attention)


def fake(a, b, attention, rotation) -> tuple[Tensor, Tensor]:
    return _rows.codes_like(a, width(a, attention))


OP = operator("activate_int8", reference, fused, fake, fits)


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def inputs(shape, rotation: bool, gated: bool = False, attention: int = 0, *, dtype, device) -> dict:
    """a, beside something else, is a part of what one product gave."""
    batch, tokens, channels = shape
    both = (3 * torch.randn((batch, tokens, attention + 2 * channels), device=device)).to(dtype)
    a, b = both[..., attention:attention + channels], both[..., attention + channels:]
    beside = activations((batch, tokens, attention), dtype=dtype, device=device) if attention else None
    return {"a": a, "b": b if gated else None, "attention": beside, "rotation": rotation}


def traffic(a, b, attention, rotation) -> int:
    return nbytes(a, b, attention) + _rows.coded_bytes(a, width(a, attention))


ACTIVATE_INT8 = Kernel(
    name="activate to int8", reference=reference, fused=fused, inputs=inputs, traffic=traffic, op=OP,
    outputs=(CODES, SCALES), limits=Limits(registers=64),
    cases=(
        Case("gelu, odd", (2, 3, 63), rotation=False),
        Case("gelu beside attention, odd", (2, 3, 50), rotation=False, attention=13),
        Case("gelu beside attention, one group", (2, 3, 192), rotation=True, attention=64),
        Case("swiglu, beyond a power of two", (1, 5, 1030), rotation=False, gated=True),
        Case("swiglu beside attention, three groups", (1, 3, 512), rotation=True, gated=True, attention=256),
        Case("FLUX single-stream block, one token", (1, 1, 12288), rotation=True, attention=3072),
        Case("Z-Image, one token", (1, 1, 10240), rotation=True, gated=True),
        Case("FLUX single-stream block 1024px", (1, 4352, 12288), rotation=True, attention=3072),
        Case("FLUX.2 single-stream block 1024px", (1, 4608, 18432), rotation=True, gated=True, attention=6144),
        Case("Z-Image 1024px", (1, 4192, 10240), rotation=True, gated=True),
    ),
)
