"""What a kernel file hands to the tests and to the benchmark: one record, so that the two cannot drift apart."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

SMALL = 1 << 14     # elements that the interpreter gets through in a moment


class Case:
    """Sizes to test or to time a kernel at: Case("flux 1024px", (1, 4608, 3072), K=3). The rest is for the kernel's `inputs`."""

    def __init__(self, name: str, shape: tuple[int, ...], **sizes):
        self.name, self.shape, self.sizes = name, shape, sizes

    @property
    def small(self) -> bool:
        """Small cases are tested without a GPU: run by the interpreter, and compiled. The others are checked and timed on one."""
        return math.prod(self.shape) <= SMALL


@dataclass(frozen=True)
class Kernel:
    name: str
    reference: Callable                 # plain torch; the definition of right
    fused: Callable                     # the same function through Triton, for what `reference` and it both take
    inputs: Callable                    # (shape, **sizes, dtype, device) -> the arguments of both, by name
    traffic: Callable                   # (**inputs) -> bytes that memory must move at the least
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
