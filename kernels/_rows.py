"""For kernels where one program works on one row of channels: sizes, norms, and how a row leaves, as int8 codes above all.

Tokens are [B, N, C]: program (n, b) has row b * N + n. What is the same for all tokens of a picture is [B or 1, 1, C].
"""
import torch
from torch import Tensor

from ._hadamard import GROUP, places, rotate, rotated
from ._int8 import coded, magnitude, nearest, row_scales, scale_of
from ._triton import FLOATS, tl, triton

LONGEST = 1 << 15       # channels of a row that one program holds
WIDEST = 1 << 13        # of a piece of one: 1024 threads


# for wrappers ----------------------------------------------------------------------------------------------------------
def checked(tokens: Tensor, rows: dict[str, Tensor | None], rotation: bool = False) -> None:
    """ValueError unless each of `rows`, by name, is one row of channels for every picture of `tokens`, [B, N, C], or one for all."""
    if tokens.ndim != 3:
        raise ValueError(f"tokens of the shape {tuple(tokens.shape)} came, and [B, N, C] was expected; reshape them")
    batch, _, channels = tokens.shape
    for name, row in rows.items():
        if row is not None and (row.ndim != 3 or row.shape[0] not in (1, batch) or row.shape[1:] != (1, channels)):
            raise ValueError(f"{name} of the shape {tuple(row.shape)} came beside tokens {tuple(tokens.shape)}; pass [{batch} or 1, 1, {channels}]")
    whole_groups(channels, rotation)


def checked_weight(weight: Tensor | None, channels: int) -> None:
    if weight is not None and weight.shape != (channels,):
        raise ValueError(f"a norm's weight of the shape {tuple(weight.shape)} came beside {channels} channels; pass [{channels}]")


def whole_groups(channels: int, rotation: bool) -> None:
    if rotation and channels % GROUP:
        raise ValueError(f"rows of {channels} channels came; the rotation works on groups of {GROUP}")


def fits(channels: int, *tensors: Tensor | None) -> bool:
    """Whether a kernel takes rows of so many channels, and these tensors: neighbouring channels lie side by side, whatever lies between rows."""
    there = [tensor for tensor in tensors if tensor is not None]
    return 0 < channels <= LONGEST and all(
        tensor.dtype in FLOATS and tensor.numel() > 0 and tensor.stride(-1) == 1 and tensor.device == there[0].device for tensor in there)


def pieces(channels: int, itemsize: int) -> dict[str, int]:
    """Into how many pieces of which width a row goes, and the warps for 8 channels of each piece in each thread.

    Widths are powers of 2: with several pieces less is left empty than with one, 3072 channels being 3 times 1024 but three quarters of 4096.
    More than 4 pieces do not fit into 64 registers, and of fp32 hardly more than one: its addresses take more of them.
    """
    whole = max(triton.next_power_of_2(channels), GROUP)
    if whole <= 1024 or itemsize > 2:
        width = min(whole, WIDEST)
    else:
        widths = [width for width in (1024, 2048, 4096) if channels <= 4 * width] or [WIDEST]
        width = min(widths, key=lambda width: (triton.cdiv(channels, width) * width, abs(triton.cdiv(channels, width) - 2)))
    return {"PIECES": triton.cdiv(channels, width), "PIECE": width, "num_warps": width // 256}


def batch_stride(row: Tensor | None) -> int:
    """From one picture's row to the next one's; 0 where one serves all."""
    return 0 if row is None or row.shape[0] == 1 else row.stride(0)


def codes_like(tokens: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Room for codes [B, N, C] and scales [B, N, 1]."""
    shape = tokens.shape[:-1]
    return torch.empty((*shape, channels), dtype=torch.int8, device=tokens.device), torch.empty((*shape, 1), dtype=torch.float32, device=tokens.device)


# for references --------------------------------------------------------------------------------------------------------
def layer_norm(x: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)


def multiplier(scale: Tensor, one_plus: bool) -> Tensor:
    return 1 + scale.float() if one_plus else scale.float()


def quantized(y: Tensor, rotation: bool) -> tuple[Tensor, Tensor]:
    """y: [..., C] in fp32. Codes and scales are contiguous, as is announced of them, however y lies in memory."""
    y = (rotated(y) if rotation else y).contiguous()
    scales = row_scales(y)
    return coded(y, scales), scales


# Triton ----------------------------------------------------------------------------------------------------------------
# A row is a tuple of PIECES blocks, b_ each, of PIECE channels in fp32, with zeros behind the last channel.
@triton.jit
def load_row(pointer, channels, PIECES: tl.constexpr, PIECE: tl.constexpr):
    row = ()
    for i in tl.static_range(PIECES):
        at = i * PIECE + tl.arange(0, PIECE).to(tl.int64)
        row = row + (tl.load(pointer + at, mask=at < channels, other=0.0).to(tl.float32),)
    return row


@triton.jit
def times_row(row, pointer, channels, PLUS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """row (PLUS + what is at the pointer)"""
    out = ()
    for i in tl.static_range(PIECES):
        at = i * PIECE + tl.arange(0, PIECE).to(tl.int64)
        b_by = tl.load(pointer + at, mask=at < channels, other=0.0).to(tl.float32)
        if PLUS:
            b_by += PLUS
        out = out + (row[i] * b_by,)
    return out


@triton.jit
def plus_row(row, pointer, channels, PIECES: tl.constexpr, PIECE: tl.constexpr):
    out = ()
    for i in tl.static_range(PIECES):
        at = i * PIECE + tl.arange(0, PIECE).to(tl.int64)
        out = out + (row[i] + tl.load(pointer + at, mask=at < channels, other=0.0).to(tl.float32),)
    return out


@triton.jit
def rounded_row(row, TYPE: tl.constexpr, PIECES: tl.constexpr):
    out = ()
    for i in tl.static_range(PIECES):
        out = out + (row[i].to(TYPE).to(tl.float32),)
    return out


@triton.jit
def sum_of_squares(row, PIECES: tl.constexpr):
    b_sum = row[0] * row[0]
    for i in tl.static_range(1, PIECES):
        b_sum += row[i] * row[i]
    return tl.sum(b_sum, 0)


@triton.jit
def layer_normed(row, channels, eps, PIECES: tl.constexpr, PIECE: tl.constexpr):
    b_sum = row[0]
    for i in tl.static_range(1, PIECES):
        b_sum += row[i]
    mean = tl.sum(b_sum, 0) / channels
    off = ()
    for i in tl.static_range(PIECES):
        at = i * PIECE + tl.arange(0, PIECE)
        off = off + (tl.where(at < channels, row[i] - mean, 0.0),)
    return scaled_row(off, tl.rsqrt(sum_of_squares(off, PIECES) / channels + eps), PIECES)


@triton.jit
def rms_normed(row, channels, eps, PIECES: tl.constexpr):
    return scaled_row(row, tl.rsqrt(sum_of_squares(row, PIECES) / channels + eps), PIECES)


@triton.jit
def scaled_row(row, by, PIECES: tl.constexpr):
    out = ()
    for i in tl.static_range(PIECES):
        out = out + (row[i] * by,)
    return out


@triton.jit
def store_row(row, pointer, channels, PIECES: tl.constexpr, PIECE: tl.constexpr):
    for i in tl.static_range(PIECES):
        at = i * PIECE + tl.arange(0, PIECE).to(tl.int64)
        tl.store(pointer + at, row[i].to(pointer.dtype.element_ty), mask=at < channels)


@triton.jit
def store_codes(row, codes, scales, number, channels, ROTATION: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """codes, scales: of row 0; this one is row `number`."""
    turned = ()
    b_most = tl.zeros((PIECE,), tl.int32)
    for i in tl.static_range(PIECES):
        b_y = row[i]
        if ROTATION:
            b_y = rotate(b_y, PIECE)
        b_most = tl.maximum(b_most, magnitude(b_y))
        turned = turned + (b_y,)
    scale = scale_of(b_most)
    tl.store(scales + number, scale)
    for i in tl.static_range(PIECES):
        b_codes = nearest(turned[i] / scale)      # the scale is the row's own, so nothing lies beyond it
        if ROTATION:
            at = i * PIECE + places(PIECE)
            tl.store(codes + number * channels + at, tl.reshape(b_codes, (PIECE // 4, 4)), mask=at < channels)
        else:
            at = i * PIECE + tl.arange(0, PIECE).to(tl.int64)
            tl.store(codes + number * channels + at, b_codes, mask=at < channels)


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def activations(shape, *, dtype, device) -> Tensor:
    """Tokens of sizes far apart, with a few channels far larger than the rest. Of several pictures a view into something wider, NaN between."""
    *rows, channels = shape
    x = torch.randn(shape, device=device) * torch.exp(torch.randn((*rows, 1), device=device))
    x[..., ::97] *= 20
    wide = torch.full((*rows, channels + (16 if rows[0] > 1 else 0)), torch.nan, dtype=dtype, device=device)
    wide[..., :channels] = x
    return wide[..., :channels]


def chunks(shape, count: int, *, dtype, device) -> tuple[Tensor, ...]:
    """[B, 1, C] each, as a modulation layer gives them: parts of one tensor."""
    batch, _, channels = shape
    return (0.3 * torch.randn((batch, 1, count * channels), device=device)).to(dtype).chunk(count, -1)


def coded_bytes(tokens: Tensor, channels: int) -> int:
    rows = tokens.numel() // tokens.shape[-1]
    return rows * (channels + 4)
