"""Triton, or stand-ins that let a kernel file be imported without it; and whether a device can run what it compiles."""
import functools
import logging
import subprocess

import torch

try:
    import triton
    import triton.language as tl
except (ImportError, AttributeError, OSError, RuntimeError):    # missing, or one that does not fit this torch or this system
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda kernel=None, **options: kernel or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=object)

HAS_TRITON = hasattr(triton, "runtime")
OLDEST = (8, 0)     # the compute capability from which on the tests compile
logger = logging.getLogger(__name__)


@triton.jit
def _probe(out):
    tl.store(out, 1.0)


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether kernels run on `device`; tried once for each. A machine with Triton and without a C compiler is common.

    False under TRITON_INTERPRET, where Triton computes on the CPU and tests call a kernel by itself.
    """
    return not hindrance(device) and not failure(device)


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


@functools.cache
def failure(device: torch.device) -> str:
    """Why Triton cannot compile and run a kernel on `device`, in a phrase; empty where it can."""
    try:
        with torch.cuda.device(device):
            _probe[(1,)](torch.empty(1, device=device))
    except torch.OutOfMemoryError:
        raise               # says nothing about Triton
    except (RuntimeError, ImportError, AttributeError, OSError, subprocess.SubprocessError) as error:
        logger.warning("Triton cannot compile for %s (%s); plain torch does the work of the kernels, slower", device, error)
        return "Triton is installed and cannot compile here; most often a C compiler is missing"
    return ""


def architecture(device: torch.device) -> int:
    """What Triton compiles for on `device`: 89 for compute capability 8.9. 0 where it interprets."""
    if not isinstance(_probe, triton.runtime.JITFunction):
        return 0
    with torch.cuda.device(device if device.type == "cuda" else -1):      # the tests stand a driver where there is no GPU
        return triton.runtime.driver.active.get_current_target().arch
