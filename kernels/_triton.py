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
    """Whether kernels run on `device`; asked once for each. A machine with Triton and without a C compiler is common.

    False under TRITON_INTERPRET, where Triton computes on the CPU and tests call a kernel by itself.
    """
    if device.type != "cuda" or torch.version.hip or not HAS_TRITON or not isinstance(_probe, triton.runtime.JITFunction):
        return False
    if torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        with torch.cuda.device(device):
            _probe[(1,)](torch.empty(1, device=device))
    except torch.OutOfMemoryError:
        raise               # says nothing about Triton
    except (RuntimeError, ImportError, AttributeError, OSError, subprocess.SubprocessError) as error:
        logger.warning("Triton cannot compile for %s (%s); plain torch does the work of the kernels, slower", device, error)
        return False
    return True


def architecture(device: torch.device) -> int:
    """What Triton compiles for on `device`: 89 for compute capability 8.9. 0 where it interprets."""
    if not isinstance(_probe, triton.runtime.JITFunction):
        return 0
    with torch.cuda.device(device if device.type == "cuda" else -1):      # the tests stand a driver where there is no GPU
        return triton.runtime.driver.active.get_current_target().arch
