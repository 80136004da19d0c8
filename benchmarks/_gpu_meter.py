"""How `bench gpu` measures: times by events on the GPU, memory by torch's own count, shares by its profiler."""
import gc
from collections import defaultdict
from collections.abc import Callable

import comfy.model_management
import psutil
import torch

from benchmarks import kernels

ATTENTION = ("flash", "fmha", "attn", "attention", "sage")
MATRIX = ("gemm", "cutlass", "nvjet", "xmma", "wgmma", "gemv", "splitk", "cublas", "matmul", "scaled_mm", "_int_mm", "_int8_linear")
OTHER = ("memcpy", "memset", "dequantize", "quantize")      # told first: kernels that make codes may say what for


class GpuMeter:
    """Of the GPU that the host uses."""

    def __init__(self):
        self.device = comfy.model_management.get_torch_device()

    def microseconds(self, call: Callable[[], object]) -> float:
        return kernels.microseconds(call)

    def copy_speed(self) -> float:
        """Bytes in a microsecond, read and written, of a large copy."""
        return kernels.bytes_per_microsecond()

    def stamp(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, stamps: list) -> list[float]:
        """Between each stamp and the next."""
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in zip(stamps, stamps[1:], strict=False)]

    def shares(self, call: Callable[[], object]) -> dict[str, float]:
        """Milliseconds of the GPU in matrix products, in attention and in all else."""
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        on_gpu = [(event.key, event.self_device_time_total) for event in profile.key_averages()
                  if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
        if not on_gpu:
            raise RuntimeError("the profiler saw no kernel; most often the driver does not allow it to ordinary users")
        return sorted_out(on_gpu)

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes that tensors took at most."""
        return torch.cuda.max_memory_allocated(self.device)

    def room(self) -> int:
        """Bytes of the GPU that are free, or held by torch for nobody."""
        return comfy.model_management.get_free_memory(self.device)

    def host_room(self) -> int:
        return psutil.virtual_memory().available

    def release(self) -> None:
        gc.collect()
        comfy.model_management.cleanup_models()
        comfy.model_management.soft_empty_cache()


def kind_of(kernel: str) -> str:
    """What a kernel of the GPU does, by its name: products, attention or elementwise."""
    name = kernel.lower()
    if any(part in name for part in OTHER) and not any(part in name for part in ("cutlass", "gemm")):
        return "elementwise"
    if any(part in name for part in ATTENTION):
        return "attention"
    return "products" if any(part in name for part in MATRIX) else "elementwise"


def sorted_out(times: list[tuple[str, float]]) -> dict[str, float]:
    """(kernel, microseconds) -> milliseconds of each kind."""
    found: dict[str, float] = defaultdict(float)
    for name, time in times:
        found[kind_of(name)] += time / 1000
    return {kind: found[kind] for kind in ("products", "attention", "elementwise")}
