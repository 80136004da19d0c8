"""Weighted sum of snapshots, and how far it is from something known, in one pass over them.

    out = sum_k w_k H_k + anchor            drift = mean|out - against| / mean|against|, over a sample
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import FLOATS, tl, triton, usable
from .drift import FLOOR, relative_error, sampled, size, stride
from .spec import Case, Kernel, nbytes

MOST = 8            # snapshots that the kernel takes
BLOCK, WARPS = 1024, 4
FP8 = torch.float8_e4m3fn


def combine(
    weights: Sequence[float], snapshots: Sequence[Tensor], anchor: Tensor | None = None, *,
    out_dtype: torch.dtype | None = None, against: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The weighted sum, a new tensor; with `against` also its drift from that, 0-d fp32 on the device, which nothing waits for.

    All tensors have one shape. Sums are in fp32 and rounded once, to `out_dtype` or else to the type of the snapshots.
    fp8 snapshots are stored divided by a scale each: multiply their weights by it, and tell `out_dtype`.
    A snapshot at weight 0 is not read. What an extrapolation carries beyond the range of fp16 is held at its end, as
    the host's fp16 blocks do.
    """
    others = [tensor for tensor in (anchor, against) if tensor is not None]
    dtype = checked(weights, snapshots, others, out_dtype)
    run = fused if fits(snapshots, others, dtype) else reference
    return run(weights, snapshots, anchor, out_dtype=dtype, against=against)


def combine_error(weights: Sequence[float], snapshots: Sequence[Tensor], actual: Tensor) -> Tensor:
    """The drift from `actual` of what `combine` would return in its type, without making that. 0-d fp32 on the device.

    `combine_errors` for one sum; the pack's policies compare several.
    """
    (error,) = combine_errors([(weights, snapshots)], actual)
    return error


def combine_errors(sums: Sequence[tuple[Sequence[float], Sequence[Tensor]]], actual: Tensor) -> list[Tensor]:
    """`combine_error` of several sums, weights and snapshots, at once: what they share is worked out once, and no bit differs."""
    for weights, snapshots in sums:
        checked(weights, snapshots, [actual], actual.dtype)
    if all(fits(snapshots, [actual], actual.dtype) for _, snapshots in sums):
        return [fused_error(weights, snapshots, actual) for weights, snapshots in sums]
    return reference_errors(sums, actual)


def checked(weights, snapshots, others, out_dtype: torch.dtype | None) -> torch.dtype:
    """The type of the result; ValueError where the arguments make no sense together."""
    if not snapshots or len(weights) != len(snapshots):
        raise ValueError(f"{len(weights)} weights came with {len(snapshots)} snapshots; pass at least one snapshot, and one weight for each")
    shapes = {tensor.shape for tensor in (*snapshots, *others)}
    if len(shapes) > 1:
        told = ", ".join(str(tuple(shape)) for shape in sorted(shapes))
        raise ValueError(f"tensors of the shapes {told} came together; combine takes snapshots, anchor and against of one")
    dtype = out_dtype or snapshots[0].dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"the result would be {dtype}, which cannot hold a sum; tell out_dtype, one of {', '.join(map(str, FLOATS))}")
    return dtype


def fits(snapshots: Sequence[Tensor], others: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the kernel takes them; the reference takes the rest."""
    first = snapshots[0]
    return (
        usable(first.device) and len(snapshots) <= MOST and first.numel() > 0
        and dtype in FLOATS and first.dtype in (*FLOATS, FP8)
        and all(snapshot.dtype is first.dtype for snapshot in snapshots) and all(tensor.dtype in FLOATS for tensor in others)
        and all(tensor.device == first.device and tensor.is_contiguous() for tensor in (*snapshots, *others))
    )


# plain torch: the definition of right ----------------------------------------------------------------------------------
def reference(weights, snapshots, anchor=None, *, out_dtype=None, against=None):
    terms = [(weight, snapshot) for weight, snapshot in zip(weights, snapshots, strict=True) if weight]
    if anchor is not None:
        out = anchor.to(torch.float32, copy=True)
    elif terms:
        out = terms[0][1].float() * terms.pop(0)[0]
    else:
        out = torch.zeros_like(snapshots[0], dtype=torch.float32)
    for weight, snapshot in terms:
        out.add_(snapshot.float() if snapshot.dtype is FP8 else snapshot, alpha=weight)     # torch does no sums with fp8
    dtype = out_dtype or snapshots[0].dtype
    if dtype is torch.float16:
        out.clamp_(-65504.0, 65504.0)
    out = out.to(dtype)
    return out if against is None else (out, relative_error(sampled(out), sampled(against)))


def reference_error(weights, snapshots, actual):
    (error,) = reference_errors([(weights, snapshots)], actual)
    return error


def reference_errors(sums, actual):
    actual = sampled(actual)
    known, samples = size(actual), {id(snapshot): snapshot for _, snapshots in sums for snapshot in snapshots}
    samples = {key: sampled(snapshot) for key, snapshot in samples.items()}
    return [relative_error(said(weights, [samples[id(s)] for s in snapshots], actual.dtype), actual, known) for weights, snapshots in sums]


def said(weights, snapshots, dtype: torch.dtype) -> Tensor:
    """What `reference` gives, or the snapshot itself where that is all of it."""
    if dtype is not torch.float16 and weights[-1] == 1.0 and not any(weights[:-1]):
        return snapshots[-1].to(dtype)
    return reference(weights, snapshots, out_dtype=dtype)


# Triton ----------------------------------------------------------------------------------------------------------------
@triton.jit
def _load(pointer, at, mask):
    b_x = tl.load(pointer + at, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.uint8:
        # The bits of an fp8 e4m3: GPUs before sm_89 have no such type. fp16 has the same fields with another bias.
        bits = b_x.to(tl.uint16)
        b_half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        b_float = tl.where((bits & 0x7F) == 0x7F, float("nan"), b_half.to(tl.float32) * 256.0)
    else:
        b_float = b_x.to(tl.float32)
    return b_float


@triton.jit
def _combine_kernel(
    h0, h1, h2, h3, h4, h5, h6, h7, w0, w1, w2, w3, w4, w5, w6, w7,     # the first K of them count
    anchor, against, out, sums,                                         # None where not wanted; sums: [2, programs]
    elements, stride, K: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    at = program * BLOCK + lane
    if out is None:
        at = at * stride        # nothing but the sample
    inside = at < elements

    # [BLOCK]
    if anchor is None:
        b_out = tl.zeros((BLOCK,), tl.float32)
    else:
        b_out = _load(anchor, at, inside)
    if K > 0:
        b_out += w0 * _load(h0, at, inside)
    if K > 1:
        b_out += w1 * _load(h1, at, inside)
    if K > 2:
        b_out += w2 * _load(h2, at, inside)
    if K > 3:
        b_out += w3 * _load(h3, at, inside)
    if K > 4:
        b_out += w4 * _load(h4, at, inside)
    if K > 5:
        b_out += w5 * _load(h5, at, inside)
    if K > 6:
        b_out += w6 * _load(h6, at, inside)
    if K > 7:
        b_out += w7 * _load(h7, at, inside)

    if TYPE == tl.float16:      # by comparisons, which leave NaN alone
        b_out = tl.where(b_out > 65504.0, 65504.0, b_out)
        b_out = tl.where(b_out < -65504.0, -65504.0, b_out)
    b_out = b_out.to(TYPE)
    if out is not None:
        tl.store(out + at, b_out, mask=inside)

    if against is not None:
        looked_at = inside
        if out is not None:     # a remainder of 64 bits is slow, so it is taken once and not per element
            phase = ((program * BLOCK) % stride).to(tl.int32)
            looked_at = inside & ((phase + lane) % stride == 0)
        b_against = _load(against, at, looked_at)
        b_off = tl.where(looked_at, tl.abs(b_out.to(tl.float32) - b_against), 0.0)
        # Sums of each program by themselves, and no atomics: the same inputs give the same bits.
        tl.store(sums + program, tl.sum(b_off, 0))
        tl.store(sums + (tl.num_programs(0) + program), tl.sum(tl.abs(b_against), 0))


def fused(weights, snapshots, anchor=None, *, out_dtype=None, against=None):
    """Contiguous tensors of one device and shape; 1 to MOST snapshots of one type."""
    out = torch.empty_like(snapshots[0], dtype=out_dtype)
    drift = launch(weights, snapshots, anchor, against, out, out.dtype)
    return out if against is None else (out, drift)


def fused_error(weights, snapshots, actual):
    return launch(weights, snapshots, None, actual, None, actual.dtype)


def launch(weights, snapshots, anchor, against, out, dtype: torch.dtype) -> Tensor | None:
    """Run the kernel. Returns the drift where there is something to compare with. Copies nothing to the device and waits for nothing."""
    first = snapshots[0]
    elements, step = first.numel(), stride(first.numel())
    samples = triton.cdiv(elements, step)
    work, block = (elements, BLOCK) if out is not None else (samples, BLOCK // 4)    # reads apart from each other wait: more programs
    programs = triton.cdiv(work, block)
    sums = None if against is None else torch.empty((2, programs), dtype=torch.float32, device=first.device)

    terms = [(float(weight), snapshot) for weight, snapshot in zip(weights, snapshots, strict=True) if weight]
    used = len(terms)
    terms += [(0.0, first)] * (MOST - used)
    pointers = [snapshot.view(torch.uint8) if snapshot.dtype is FP8 else snapshot for _, snapshot in terms]
    with torch.cuda.device_of(first):
        _combine_kernel[(programs,)](
            *pointers, *(weight for weight, _ in terms), anchor, against, out, sums, elements, step,
            K=used, TYPE=triton_type(dtype), BLOCK=block, num_warps=WARPS)
    if against is None:
        return None
    means = sums.sum(1) / samples
    return means[0] / means[1].clamp_min(FLOOR)


def triton_type(dtype: torch.dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def inputs(shape, K: int, anchor: bool = False, against: bool = False, fp8: bool = False, *, dtype, device) -> dict:
    """Snapshots that differ little from each other, as those of a run do, and the weights that continue them as a polynomial: of both signs."""
    base = torch.randn(shape, dtype=torch.float32, device=device)
    near = lambda: base + 0.1 * torch.randn(shape, dtype=torch.float32, device=device)
    weights = [float(math.comb(K, k) * (-1) ** (K - 1 - k)) for k in range(K)]
    given = {"weights": weights, "snapshots": [near().to(FP8 if fp8 else dtype) for _ in range(K)]}
    if anchor:
        given["anchor"] = near().to(dtype)
    if fp8:
        given["out_dtype"] = dtype
    if against:
        given["against"] = near().to(dtype)
    return given


def error_inputs(shape, K: int, fp8: bool = False, *, dtype, device) -> dict:
    given = inputs(shape, K, against=True, fp8=fp8, dtype=dtype, device=device)
    return {"weights": given["weights"], "snapshots": given["snapshots"], "actual": given["against"]}


def sample(tensor: Tensor) -> int:
    """Bytes read to see a sample: memory moves at least 32 at a time."""
    elements = tensor.numel()
    return min(nbytes(tensor), 32 * len(range(0, elements, stride(elements))))


def traffic(weights, snapshots, anchor=None, out_dtype=None, against=None) -> int:
    moved = nbytes(*snapshots, anchor)
    return moved + snapshots[0].numel() * (out_dtype or snapshots[0].dtype).itemsize + (0 if against is None else sample(against))


def error_traffic(weights, snapshots, actual) -> int:
    return sum(sample(tensor) for tensor in (*snapshots, actual))


COMBINE = Kernel(
    name="combine", reference=reference, fused=fused, inputs=inputs, traffic=traffic,
    cases=(
        Case("one element", (1,), K=1),
        Case("hold on an anchor", (63,), K=1, anchor=True),
        Case("line", (1000,), K=2),
        Case("parabola on an anchor", (3, 8, 63), K=3, anchor=True),
        Case("cubic with drift", (3, 8, 63), K=4, anchor=True, against=True),
        Case("five with drift, one whole block", (2, 16, 32), K=5, against=True),
        Case("six, one more than a block", (1025,), K=6, anchor=True, against=True),
        Case("seven in fp8", (3, 8, 63), K=7, fp8=True),
        Case("eight", (2, 16, 80), K=8),
        Case("eight in fp8, all wanted", (1, 63, 100), K=8, anchor=True, against=True, fp8=True),
        Case("eight in fp8, all wanted, even", (1, 64, 80), K=8, anchor=True, against=True, fp8=True),
        Case("FLUX latent 1024px", (1, 16, 128, 128), K=3),
        Case("FLUX block range 1024px", (1, 4608, 3072), K=3, anchor=True),
        Case("FLUX block range 1024px, drift", (1, 4608, 3072), K=3, anchor=True, against=True),
        Case("Z-Image block range 1024px", (2, 4128, 3840), K=2, anchor=True),
        Case("Z-Image block range 1024px, fp8", (2, 4128, 3840), K=2, anchor=True, fp8=True),
        Case("eight snapshots", (1, 4608, 3072), K=8),
    ),
)

COMBINE_ERROR = Kernel(
    name="combine error", reference=reference_error, fused=fused_error, inputs=error_inputs, traffic=error_traffic,
    cases=(
        Case("one element", (1,), K=1),
        Case("odd", (63,), K=2),
        Case("line", (1000,), K=2),
        Case("parabola", (3, 8, 63), K=3),
        Case("five, one whole block", (2, 16, 32), K=5),
        Case("eight in fp8", (1, 63, 100), K=8, fp8=True),
        Case("FLUX latent 1024px", (1, 16, 128, 128), K=3),
        Case("FLUX block range 1024px", (1, 4608, 3072), K=3),
        Case("Z-Image block range 1024px", (2, 4128, 3840), K=4),
    ),
)
