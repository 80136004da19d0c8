"""Triton, or stand-ins that let a kernel file be imported without it; and whether a device can run what it compiles."""
import functools
import logging
import re
import subprocess
from textwrap import shorten

import torch

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.language import make_tensor_descriptor  # noqa: F401    # int8_linear needs it, and Triton has it from 3.4 on
    from triton.tools.tensor_descriptor import TensorDescriptor
except (ImportError, AttributeError, OSError, RuntimeError):    # missing, or one that does not fit this torch or this system
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda kernel=None, **options: kernel or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=object)
    TensorDescriptor, TritonError = None, RuntimeError

HAS_TRITON = hasattr(triton, "runtime")
OLDEST = (8, 0)     # the compute capability from which on the tests compile
FLOATS = (torch.float32, torch.float16, torch.bfloat16)     # what kernels read and write; they compute in fp32
# What compiling and launching may end in, other people's kernels too. Triton's own errors are none of Python's.
FAILURES = (TritonError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, OSError, subprocess.SubprocessError)
logger = logging.getLogger(__name__)


@triton.jit
def _probe(out):
    tl.store(out, 1.0)


def usable(device: torch.device) -> bool:
    """Whether kernels run on `device`. A machine with Triton and without a C compiler is common.

    False under TRITON_INTERPRET, where Triton computes on the CPU and tests call a kernel by itself.
    """
    return not failure(device)


def hindrance(device: torch.device) -> str:
    """Why `device` is none for Triton, in a phrase; empty where compiling may be tried. Looks and tries nothing."""
    if not HAS_TRITON:
        return "Triton is not installed, or does not fit this torch"
    if device.type != "cuda":
        return f"Reprise's kernels are for NVIDIA GPUs, not for {device.type}"
    if torch.version.hip:
        return "Reprise's kernels are for NVIDIA GPUs, not for AMD's"
    if not isinstance(_probe, triton.runtime.JITFunction):
        return "Triton interprets (TRITON_INTERPRET is set)"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        return f"the GPU is older than Ampere (compute capability {'.'.join(map(str, capability))})"
    return ""


def failure(device: torch.device) -> str:
    """Why Triton cannot compile and run a kernel on `device`, in a phrase; empty where it can."""
    try:
        return tried(device)
    except torch.OutOfMemoryError:
        return "the GPU had no memory left to try it"


@functools.cache
def tried(device: torch.device) -> str:
    """As `failure`, once for each device. OutOfMemoryError, which says nothing about Triton and is not remembered: the next call tries again."""
    if why := hindrance(device):
        return why
    try:
        with torch.cuda.device(device):
            _probe[(1,)](torch.empty(1, device=device))
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        if out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        logger.warning("Triton cannot compile for %s (%s); plain torch does the work of the kernels, slower", device, error)
        guess = "" if isinstance(error, TritonError) else "; most often a C compiler is missing"
        return f"Triton is installed and cannot compile here ({told(error)}){guess}"
    return ""


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()      # Triton's launcher has no error of its own for it


def told(error: BaseException) -> str:
    """Its name and first line, without the folders in it: reports are shown to others."""
    first = re.sub(r"""[^\s'"]*[\\/](?=[^\s'"])""", "", str(error).strip().partition("\n")[0])
    return shorten(f"{type(error).__name__}: {first}" if first else type(error).__name__, 160, placeholder=" ...")


def architecture(device: torch.device) -> int:
    """What Triton compiles for on `device`: 89 for compute capability 8.9. 0 where it interprets."""
    if not isinstance(_probe, triton.runtime.JITFunction):
        return 0
    with torch.cuda.device(device if device.type == "cuda" else -1):      # the tests stand a driver where there is no GPU
        return triton.runtime.driver.active.get_current_target().arch
