"""GGUF weights, as their blocks lie in the file, to what a product takes: int8 codes, with and without the rotation, or floats.

    codes = int8(w H / scale)        scale = max|w H| / 127 of the row, found once when the model is loaded

For K-quants, which stay packed in memory and are made into codes in front of each product. Neither comfy_kitchen nor the host knows
GGUF. Where comfy_kitchen's CUDA backend works, its int8 product takes these codes; where not, `int8_linear` does.
A result is a new tensor; torch gives the next layer the memory that this one left, so one layer's worth of it is all that is taken.
"""
import torch
from torch import Tensor

from ._hadamard import GROUP, places, rotate, rotated
from ._int8 import code, coded, magnitude, row_scales, scale_of
from ._op import operator
from ._triton import FLOATS, tl, triton
from .gguf import BLOCKS, UNIT, block_format
from .spec import CODES, SCALES, VALUES, Case, Kernel, Limits

TILE, WARPS = 1024, 4       # weights of a program, whole groups of the rotation


def gguf_values(packed: Tensor, block: str, dtype: torch.dtype) -> Tensor:
    """packed: uint8 [N, bytes of a row]; block: the name of its format. Returns the weights, [N, K] in `dtype`, rounded once."""
    block_format(block).columns(packed)
    return VALUES_OP(packed, block, dtype)


def gguf_row_scales(packed: Tensor, block: str, rotation: bool) -> Tensor:
    """packed: uint8 [N, bytes of a row]. Returns fp32 [N, 1], what `gguf_codes` takes."""
    groups(packed, block, rotation)
    return SCALES_OP(packed, block, rotation)


def gguf_codes(packed: Tensor, scales: Tensor, block: str, rotation: bool) -> Tensor:
    """packed: uint8 [N, bytes of a row]; scales: fp32 [N, 1], from `gguf_row_scales` with the same `rotation`. Returns int8 [N, K]."""
    groups(packed, block, rotation)
    if scales.shape != (packed.shape[0], 1) or scales.dtype is not torch.float32:
        raise ValueError(f"scales of {scales.dtype} {tuple(scales.shape)} came; float32 {(packed.shape[0], 1)} was expected, from gguf_row_scales")
    return CODES_OP(packed, scales, block, rotation)


def groups(packed: Tensor, block: str, rotation: bool) -> None:
    columns = block_format(block).columns(packed)
    if rotation and columns % GROUP:
        raise ValueError(f"rows of {columns} weights came; the rotation works on groups of {GROUP}")


# plain torch: the definition of right ----------------------------------------------------------------------------------
def reference_values(packed: Tensor, block: str, dtype: torch.dtype) -> Tensor:
    return BLOCKS[block].values(packed, dtype)


def reference_scales(packed: Tensor, block: str, rotation: bool) -> Tensor:
    return torch.cat([row_scales(weights) for weights in parts(packed, block, rotation)])


def reference_codes(packed: Tensor, scales: Tensor, block: str, rotation: bool) -> Tensor:
    codes, row = empty(packed, block, torch.int8), 0
    for weights in parts(packed, block, rotation):
        rows = slice(row, row := row + len(weights))
        codes[rows] = coded(weights, scales[rows])
    return codes


def parts(packed: Tensor, block: str, rotation: bool):
    """The weights in fp32, a few rows at a time."""
    known = BLOCKS[block]
    for rows in known.parts(packed):
        weights = known.values(rows)
        yield rotated(weights) if rotation else weights


def empty(packed: Tensor, block: str, dtype: torch.dtype) -> Tensor:
    return torch.empty((packed.shape[0], BLOCKS[block].columns(packed)), dtype=dtype, device=packed.device)


# Triton ----------------------------------------------------------------------------------------------------------------
@triton.jit
def _weights(packed, row, first, columns, READ: tl.constexpr, BYTES: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr):
    """[TILE], the weights of a row from `first` on, and zeros beyond its end, where the last 16 are read again."""
    units = columns // 16
    b_unit = (first // 16 + tl.arange(0, TILE // 16)[:, None]).to(tl.int64)
    b_held = tl.minimum(b_unit, units - 1)
    b_block = packed + (row * (units // UNITS) + b_held // UNITS) * BYTES
    b_w = READ(b_block, (b_held % UNITS).to(tl.int32), tl.arange(0, 16)[None, :])
    return tl.reshape(tl.where(b_unit < units, b_w, 0.0), (TILE,))


@triton.jit
def _values_kernel(packed, out, columns, READ: tl.constexpr, BYTES: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * TILE
    b_w = _weights(packed, row, first, columns, READ, BYTES, UNITS, TILE)
    at = first + tl.arange(0, TILE)
    tl.store(out + (row * columns + at), b_w.to(out.dtype.element_ty), mask=at < columns)


@triton.jit
def _codes_kernel(packed, scales, codes, columns, READ: tl.constexpr, BYTES: tl.constexpr, UNITS: tl.constexpr, ROTATION: tl.constexpr, TILE: tl.constexpr):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * TILE
    b_w = _weights(packed, row, first, columns, READ, BYTES, UNITS, TILE)
    if ROTATION:
        b_codes = tl.reshape(code(rotate(b_w, TILE), tl.load(scales + row)), (TILE // 4, 4))
        at = first + places(TILE)
    else:
        b_codes = code(b_w, tl.load(scales + row))
        at = first + tl.arange(0, TILE)
    tl.store(codes + (row * columns + at), b_codes, mask=at < columns)


@triton.jit
def _scales_kernel(packed, scales, columns, READ: tl.constexpr, BYTES: tl.constexpr, UNITS: tl.constexpr, ROTATION: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b_most = tl.zeros((TILE,), tl.int32)
    for first in range(0, columns, TILE):
        b_w = _weights(packed, row, first, columns, READ, BYTES, UNITS, TILE)
        if ROTATION:
            b_w = rotate(b_w, TILE)
        b_most = tl.maximum(b_most, magnitude(b_w))
    tl.store(scales + row, scale_of(b_most))


def fits(packed: Tensor, block: str, **others) -> bool:
    """Whether a kernel takes these blocks. All that have one have even sizes, so that each fp16 number lies on 2 bytes where the first block does."""
    return BLOCKS[block].read is not None and packed.is_contiguous() and packed.numel() > 0 and packed.data_ptr() % 2 == 0


def launch(kernel, packed: Tensor, block: str, *arguments, tiled: bool, **flags) -> None:
    known = BLOCKS[block]
    columns = known.columns(packed)
    grid = (packed.shape[0], triton.cdiv(columns, TILE)) if tiled else (packed.shape[0],)
    with torch.cuda.device_of(packed):
        kernel[grid](packed, *arguments, columns, READ=known.read, BYTES=known.bytes, UNITS=known.weights // UNIT, TILE=TILE, num_warps=WARPS, **flags)


def fused_values(packed: Tensor, block: str, dtype: torch.dtype) -> Tensor:
    launch(_values_kernel, packed, block, out := empty(packed, block, dtype), tiled=True)
    return out


def fused_codes(packed: Tensor, scales: Tensor, block: str, rotation: bool) -> Tensor:
    launch(_codes_kernel, packed, block, scales, codes := empty(packed, block, torch.int8), tiled=True, ROTATION=rotation)
    return codes


def fused_scales(packed: Tensor, block: str, rotation: bool) -> Tensor:
    scales = torch.empty((packed.shape[0], 1), dtype=torch.float32, device=packed.device)
    launch(_scales_kernel, packed, block, scales, tiled=False, ROTATION=rotation)
    return scales


VALUES_OP = operator(
    "gguf_values", reference_values, fused_values, empty,
    lambda packed, block, dtype: dtype in FLOATS and fits(packed, block))
SCALES_OP = operator(
    "gguf_row_scales", reference_scales, fused_scales,
    lambda packed, block, rotation: torch.empty((packed.shape[0], 1), dtype=torch.float32, device=packed.device), fits)
CODES_OP = operator(
    "gguf_codes", reference_codes, fused_codes,
    lambda packed, scales, block, rotation: empty(packed, block, torch.int8),
    lambda packed, scales, block, rotation: scales.is_contiguous() and fits(packed, block))


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def packed_weights(shape, block: str, device) -> Tensor:
    """Blocks of random bits whose fp16 numbers are small ones, as those of weights are."""
    known = BLOCKS[block]
    packed = torch.randint(0, 256, (shape[0], shape[1] // known.weights, known.bytes), dtype=torch.uint8, device=device)
    for start in known.halves:
        d = 0.01 * torch.rand(packed.shape[:2], device=device) + 0.001
        packed[..., start:start + 2] = d.half().view(torch.uint8).view(*packed.shape[:2], 2)
    return packed.view(shape[0], -1)


def value_inputs(shape, block: str, *, dtype, device) -> dict:
    return {"packed": packed_weights(shape, block, device), "block": block, "dtype": dtype}


def scale_inputs(shape, block: str, rotation: bool, *, dtype, device) -> dict:
    return {"packed": packed_weights(shape, block, device), "block": block, "rotation": rotation}


def code_inputs(shape, block: str, rotation: bool, *, dtype, device) -> dict:
    packed = packed_weights(shape, block, device)
    return {"packed": packed, "scales": reference_scales(packed, block, rotation), "block": block, "rotation": rotation}


def value_traffic(packed: Tensor, block: str, dtype: torch.dtype) -> int:
    return packed.nbytes + packed.shape[0] * BLOCKS[block].columns(packed) * dtype.itemsize


def scale_traffic(packed: Tensor, block: str, rotation: bool) -> int:
    return packed.nbytes + 4 * packed.shape[0]


def code_traffic(packed: Tensor, scales: Tensor, block: str, rotation: bool) -> int:
    return value_traffic(packed, block, torch.int8) + scales.nbytes


FUSED = tuple(name for name, known in BLOCKS.items() if known.read is not None)
LIMITS = Limits(registers=64)


def small(**flags) -> tuple[Case, ...]:
    """Odd numbers of rows, tiles that end within a row, and for blocks of 32 rows that end within a group."""
    told = ", rotated" if flags.get("rotation") else ""
    cases = [Case(f"{name}{told}", (3, 1280), block=name, **flags) for name in FUSED]
    if not told:
        cases += [Case(f"{name}, short", (5, 5 * 32), block=name, **flags) for name in FUSED if BLOCKS[name].weights == 32]
    return tuple(cases)


def large(names=FUSED, **flags) -> tuple[Case, ...]:
    return tuple(Case(f"{name}, FLUX qkv", (9216, 3072), block=name, **flags) for name in names)


GGUF_CODES = Kernel(
    name="gguf codes", reference=reference_codes, fused=fused_codes, inputs=code_inputs, traffic=code_traffic, op=CODES_OP,
    outputs=(CODES,), limits=LIMITS, dtypes=(torch.float32,),
    cases=(*small(rotation=False), *small(rotation=True), *large(rotation=True), Case("Q4_K, FLUX linear2", (3072, 15360), block="Q4_K", rotation=True)))

GGUF_ROW_SCALES = Kernel(
    name="gguf row scales", reference=reference_scales, fused=fused_scales, inputs=scale_inputs, traffic=scale_traffic, op=SCALES_OP,
    outputs=(SCALES,), limits=LIMITS, dtypes=(torch.float32,),
    cases=(*small(rotation=False), *small(rotation=True), *large(("Q6_K", "Q4_K"), rotation=True)))

GGUF_VALUES = Kernel(
    name="gguf values", reference=reference_values, fused=fused_values, inputs=value_inputs, traffic=value_traffic, op=VALUES_OP,
    outputs=(VALUES,), limits=LIMITS,
    cases=(*small(), *large()))
