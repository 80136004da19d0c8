"""What a kernel file hands to the tests and to the benchmark: one record, so that the two cannot drift apart."""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

SMALL = 1 << 14     # elements that the interpreter gets through in a moment
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}    # about one unit in the last place; the interpreter cuts bf16 off

# What an output holds, and so how near it must come to the reference.
VALUES = "values"   # floats, to within TOLERANCE of their type, or of that of the inputs where it is coarser
CODES = "codes"     # int8: the same, but for MOST_OFF of them, which are ties that fell to the other side
SCALES = "scales"   # fp32, one for each row of codes: to within SCALE_OFF of each, but for ROWS_OFF of them, which are to within TOLERANCE
MOST_OFF, SCALE_OFF = 1e-5, 1e-6
ROWS_OFF = 5e-3     # of many rows: where a sum is rounded to 16 bits before it is normed, elements that are ties move a row's scale


class Case:
    """Sizes to test or to time a kernel at: Case("flux 1024px", (1, 4608, 3072), K=3). The rest is for the kernel's `inputs`."""

    def __init__(self, name: str, shape: tuple[int, ...], **sizes):
        self.name, self.shape, self.sizes = name, shape, sizes

    @property
    def small(self) -> bool:
        """Small cases are tested without a GPU: run by the interpreter. The others are checked and timed on one. All are compiled."""
        return math.prod(self.shape) <= SMALL


@dataclass(frozen=True)
class Limits:
    """What a compiled kernel may take and what must be in it. No stack and no local memory, on any GPU, goes without saying."""
    registers: int = 128                # of each thread
    shared_bytes: int = 99 * 1024       # of each program: what sm_86, 89 and 120 have
    instructions: Mapping[int, tuple[str, ...]] = field(default_factory=dict)   # by architecture, beginnings: {89: ("IMMA.16832",), 90: ("IGMMA", "UTMALDG")}
    unlimited: tuple[int, ...] = ()     # architectures that the numbers above are not for


@dataclass(frozen=True)
class Kernel:
    name: str
    reference: Callable                 # plain torch; the definition of right
    fused: Callable                     # the same function through Triton, for what `reference` and it both take
    inputs: Callable                    # (shape, **sizes, dtype, device) -> the arguments of both, by name
    traffic: Callable                   # (**inputs) -> bytes that memory must move at the least
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    outputs: tuple[str, ...] = (VALUES,)    # what each output holds; the last one stands for the rest
    limits: Limits = Limits()
    op: Callable | None = None          # torch.ops.reprise.<name>, of the same arguments; see _op.py


def nbytes(*tensors: Tensor | None) -> int:
    """What moves where all of these are read or written once."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def several(result) -> tuple[Tensor, ...]:
    """The outputs of a kernel, also where it has one."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def faults(kernel: Kernel, got, wanted, dtype: torch.dtype = torch.float32) -> list[str]:
    """What is wrong with what a kernel made of inputs of `dtype`, beside what its reference did: a sentence for each output that is."""
    got, wanted = several(got), several(wanted)
    if len(got) != len(wanted):
        return [f"{len(got)} outputs came, {len(wanted)} were expected"]
    holds = [kernel.outputs[min(i, len(kernel.outputs) - 1)] for i in range(len(wanted))]
    told = [fault(kind, mine, true, dtype) for kind, mine, true in zip(holds, got, wanted, strict=True)]
    return [f"output {i} ({kind}): {text}" for i, (kind, text) in enumerate(zip(holds, told, strict=True)) if text]


def fault(kind: str, got: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """Why `got` is not near enough to `wanted`; nothing where it is."""
    if got.dtype is not wanted.dtype or got.shape != wanted.shape:
        return f"{got.dtype} {tuple(got.shape)} came, {wanted.dtype} {tuple(wanted.shape)} was expected"
    if kind == CODES:
        apart = (got.int() - wanted.int()).abs()
        wrong, worst = int((apart > 0).sum()), int(apart.max())
        return f"{wrong} of {apart.numel()} codes differ, by up to {worst}" if wrong > MOST_OFF * apart.numel() or worst > 1 else ""
    share = SCALE_OFF if kind == SCALES else max(TOLERANCE[dtype], TOLERANCE[wanted.dtype])
    true = wanted.double()
    apart = (got.double() - true).abs()
    bound = share * true.abs()
    if kind == VALUES:      # a sum that nearly cancels is as far off as its terms are
        bound += true.abs().max() * (1e-6 if share == TOLERANCE[torch.float32] else share)
    if kind == SCALES and dtype is not torch.float32 and int((apart > bound).sum()) <= ROWS_OFF * apart.numel():
        bound = TOLERANCE[dtype] * true.abs()
    return "" if bool((apart <= bound).all()) else f"off by up to {apart.max().item():.1e} where at most {bound.max().item():.1e} is right"
