"""Linear layer on int8 codes:  y = (x_codes w_codes^T) * x_scales * w_scales^T + bias,  then GELU, then residual + gate * y, as wanted.

For activations that a kernel has quantized already, so that none of them is read twice, and for whatever follows a product, so that it
needs no pass of its own. comfy_kitchen's CUDA `int8_linear` takes activations in bf16 and quantizes them itself: it is called instead
where it is there and nothing is fused. Its backend is off with torch builds for CUDA 12, and this kernel is the one int8 product then.
Tiles are read through tensor descriptors: written with pointers, the same loop needs 560 bytes of stack per thread on sm_89.
"""
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ._gelu import gelu_tanh
from ._op import operator
from ._triton import FLOATS, TensorDescriptor, architecture, tl, triton
from .int8_tiles import tile
from .spec import VALUES, Case, Kernel, Limits, nbytes

AT_ONCE = 1 << 22       # numbers of a result that torch computes at once, in int32 and again in fp32


def int8_linear(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype,
    gelu: bool = False, gate: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:
    """x: int8 [..., K], x_scales: fp32 [..., 1], both of `quantize_rows` or a kernel like it; weight: int8 [N, K], weight_scales: fp32 [N, 1].

    bias: [N]. gelu: the one with tanh. residual: [..., N], and gate: [B, 1, N] or [N], with which y is multiplied; B is the first side of x.
    Returns [..., N] in `out_dtype`. Sums are exact, all else is in fp32 and rounded once.

    The pack's nodes ask for no gelu, gate or residual: they stand between two products, where `activate_int8` and the residual
    kernels leave codes. Here they are for a product after which 16 bits are wanted.
    """
    K, N = x.shape[-1], weight.shape[0]
    rows = x.numel() // max(K, 1)
    if x.dtype is not torch.int8 or weight.dtype is not torch.int8 or weight.shape != (N, K):
        raise ValueError(f"x {x.dtype} {tuple(x.shape)} came with a weight {weight.dtype} {tuple(weight.shape)}; int8 [..., K] and int8 [N, K] were expected")
    if x_scales.numel() != rows or weight_scales.numel() != N:
        raise ValueError(f"{x_scales.numel()} and {weight_scales.numel()} scales came for {rows} rows and {N} columns; one for each was expected")
    if gate is not None and (residual is None or gate.numel() % N or rows % (gate.numel() // N)):
        raise ValueError(f"a gate {tuple(gate.shape)} came for {rows} rows of {N}; [B, 1, N] or [N] was expected, and a residual with it")
    y = OP(
        x.reshape(rows, K), x_scales.reshape(rows), weight, weight_scales.reshape(N), bias,
        None if gate is None else gate.reshape(-1, N), None if residual is None else residual.reshape(rows, N), gelu, out_dtype)
    return y.view(*x.shape[:-1], N)


# plain torch: the definition of right ----------------------------------------------------------------------------------
def reference(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None,
    gelu: bool, out_dtype: torch.dtype,
) -> Tensor:
    """x: [M, K], x_scales: [M], weight: [N, K], weight_scales: [N], bias: [N], gate: [B, N], residual: [M, N]. Returns [M, N].

    A few rows at a time, so that what it takes beside the result is bounded.
    """
    out = fake(x, x_scales, weight, weight_scales, bias, gate, residual, gelu, out_dtype)
    N, gates = len(weight), 1 if gate is None else len(gate)
    if x.device.type == "cuda":
        weight = rounded_up(weight, 8)
    for rows, number in parts(len(x), N, gates):
        y = product(x[rows], weight)[:, :N].float()
        y *= x_scales[rows].unsqueeze(1)
        y *= weight_scales
        if bias is not None:
            y += bias.float()
        if gelu:
            y = F.gelu(y, approximate="tanh")
        if gate is not None:
            y *= gate[number].float()
        if residual is not None:
            y += residual[rows].float()
        out[rows] = y
    return out


def parts(M: int, N: int, gates: int) -> Iterator[tuple[slice, int]]:
    """A few of M rows at a time, which have one gate in common, and the number of that."""
    few, per_gate = max(32, AT_ONCE // max(N, 1)), M // gates
    for number in range(gates):
        for row in range(0, per_gate, few):
            yield slice(number * per_gate + row, number * per_gate + min(row + few, per_gate)), number


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x w^T, exact, in int32. On CUDA for a weight that `rounded_up` has been at: torch has an int8 product for it that wants such sides."""
    if x.device.type == "cpu":
        return torch._int_mm(x, weight.T)
    if x.device.type == "cuda":
        return torch._int_mm(rounded_up(x, 1 if len(x) > 16 else 32), weight.T)[:len(x)]
    few = zip(x.split(1024, 1), weight.split(1024, 1), strict=True)      # sums that fp32 holds exactly
    return sum((a.float() @ b.float().T).int() for a, b in few)


def rounded_up(codes: Tensor, rows: int) -> Tensor:
    """With zeros, until there are whole eights of channels and whole `rows`; where there are, `codes` itself and no copy."""
    channels, below = -codes.shape[1] % 8, -codes.shape[0] % rows
    return F.pad(codes, (0, channels, 0, below)) if channels or below else codes


def fake(x, x_scales, weight, weight_scales, bias, gate, residual, gelu, out_dtype):
    return torch.empty((x.shape[0], weight.shape[0]), dtype=out_dtype, device=x.device)


# Triton ----------------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["M", "per_gate"])
def _int8_linear_kernel(
    x, weight,                                                      # [M, K] and [N, K]: descriptors of blocks [BM, BK] and [BN, BK], or pointers
    x_scales, weight_scales, bias, gate, residual, out,             # None where there is none
    M, N, K, per_gate,                                              # per_gate: rows that have one gate in common, of which each is of one picture
    DESCRIBED: tl.constexpr, GELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):
    # Programs that run at the same time share rows of x and columns of the weight: GROUP tiles of rows, then the next column.
    # No tile has rows of two gates, so a gate is read once for all of them.
    program = tl.program_id(0).to(tl.int64)
    tiles, columns = tl.cdiv(per_gate, BM), tl.cdiv(N, BN)
    group = program // columns // GROUP
    within = program - group * GROUP * columns
    high = tl.minimum(M // per_gate * tiles.to(tl.int64) - group * GROUP, GROUP)
    down, column = group * GROUP + within % high, within // high * BN
    picture = down // tiles
    row, end = picture * per_gate + down % tiles * BM, (picture + 1) * per_gate

    if not DESCRIBED:
        x = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BM, BK])
        weight = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BN, BK])
    b_sum = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        b_sum = tl.dot(x.load([row.to(tl.int32), k]), weight.load([column.to(tl.int32), k]).T, b_sum, out_dtype=tl.int32)      # beyond the ends are zeros

    at_row, at_column = row + tl.arange(0, BM), column + tl.arange(0, BN)
    in_row, in_column = at_row < end, at_column < N
    b_y = b_sum.to(tl.float32) * tl.load(x_scales + at_row, mask=in_row, other=0.0)[:, None]
    b_y *= tl.load(weight_scales + at_column, mask=in_column, other=0.0)[None, :]
    if bias is not None:
        b_y += tl.load(bias + at_column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    if GELU:
        b_y = gelu_tanh(b_y)
    at = at_row[:, None] * N + at_column[None, :]
    inside = in_row[:, None] & in_column[None, :]
    if gate is not None:
        b_y *= tl.load(gate + (picture * N + at_column), mask=in_column, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        b_y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, b_y.to(out.dtype.element_ty), mask=inside)


def fits(x, x_scales, weight, weight_scales, bias, gate, residual, gelu, out_dtype) -> bool:
    """Descriptors want rows that begin on 16 bytes."""
    tensors = [tensor for tensor in (x, x_scales, weight, weight_scales, bias, gate, residual) if tensor is not None]
    return (
        x.numel() > 0 and weight.numel() > 0 and x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
        and out_dtype in FLOATS and all(tensor.dtype in FLOATS for tensor in tensors if tensor.dtype is not torch.int8)
        and all(tensor.is_contiguous() and tensor.device == x.device for tensor in tensors)
    )


def fused(x, x_scales, weight, weight_scales, bias, gate, residual, gelu, out_dtype):
    """As `reference`; all contiguous, K a multiple of 16, on 16 bytes."""
    M, K, N = *x.shape, len(weight)
    out = fake(x, x_scales, weight, weight_scales, bias, gate, residual, gelu, out_dtype)
    per_gate = M if gate is None else M // len(gate)
    arch = architecture(x.device)
    crowded = N % 16 > 0 or residual is not None and residual.dtype is torch.float32        # elements one by one, or wide ones
    chosen = tile(arch, per_gate, N, crowded)
    described = arch >= 90      # these read tiles by themselves if told of them before the launch; others go by what the kernel knows of the sizes
    tensors = [TensorDescriptor.from_tensor(tensor, [side, chosen.k]) for tensor, side in ((x, chosen.m), (weight, chosen.n))] if described else [x, weight]
    programs = M // per_gate * triton.cdiv(per_gate, chosen.m) * triton.cdiv(N, chosen.n)
    with torch.cuda.device_of(x):
        _int8_linear_kernel[(programs,)](
            *tensors, x_scales, weight_scales, bias, gate, residual, out, M, N, K, per_gate, DESCRIBED=described, GELU=gelu,
            BM=chosen.m, BN=chosen.n, BK=chosen.k, GROUP=8, num_warps=chosen.warps, num_stages=chosen.stages)
    return out


OP = operator("int8_linear", reference, fused, fake, fits)


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def inputs(shape, K: int, bias: bool = True, gelu: bool = False, gates: int = 0, residual: bool = False, *, dtype, device) -> dict:
    """Codes of both signs with scales that bring y to about 1. `gates` of them, each for as many rows."""
    M, N = shape
    codes = lambda rows: torch.randint(-127, 128, (rows, K), dtype=torch.int8, device=device)
    scales = lambda rows: (0.5 + torch.rand(rows, device=device)) / (73.0 * K ** 0.25)
    floats = lambda *shape: torch.randn(shape, device=device).to(dtype)
    return {
        "x": codes(M), "x_scales": scales(M), "weight": codes(N), "weight_scales": scales(N), "bias": floats(N) if bias else None,
        "gate": floats(gates, N) if gates else None, "residual": floats(M, N) if gates or residual else None, "gelu": gelu, "out_dtype": dtype,
    }


def traffic(gelu: bool, out_dtype: torch.dtype, **tensors) -> int:
    return nbytes(*tensors.values()) + len(tensors["x"]) * len(tensors["weight"]) * out_dtype.itemsize


INT8_LINEAR = Kernel(
    name="int8 linear", reference=reference, fused=fused, inputs=inputs, traffic=traffic, op=OP, outputs=(VALUES,),
    limits=Limits(
        registers=180, unlimited=(100,),
        instructions={arch: (product, *reads) for arch, product, *reads in (
            (80, "IMMA.16832"), (86, "IMMA.16832"), (89, "IMMA.16832"), (90, "IGMMA", "UTMALDG"), (120, "IMMA.16832", "UTMALDG"))}),
    cases=(
        Case("one row, no bias", (1, 48), K=256, bias=False),
        Case("odd sides, gelu", (7, 51), K=272, gelu=True),
        Case("several tiles", (69, 144), K=256),
        Case("three gates", (3 * 21, 70), K=128, gates=3),
        Case("gelu, residual alone", (17, 65), K=144, gelu=True, residual=True),
        Case("FLUX hidden", (3, 128), K=3072, gates=1),
        Case("FLUX linear2", (2, 64), K=15360),
        Case("FLUX qkv 1024px", (4352, 9216), K=3072),
        Case("FLUX mlp.0 1024px", (4352, 12288), K=3072, gelu=True),
        Case("FLUX linear2 1024px, two pictures", (8704, 3072), K=15360, gates=2),
    ),
)
