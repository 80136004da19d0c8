"""Every kernel against plain torch and against the memory's speed.

    python3 dev.py bench kernels     on a GPU -> results/kernels.json; without one, whether the kernels are right, alone

A kernel is checked before it is timed, and one that is wrong gets no time. Times are medians. `roofline_us` is what the
bytes that must move would take at the speed of a large copy on the same GPU.
"""
import json
import os
import sys
from pathlib import Path

import torch

GPU = torch.cuda.is_available() and not os.environ.get("REPRISE_CPU")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"    # before Triton is imported
from testbed import inprocess  # noqa: I001

inprocess.leave_root()
inprocess.package("pack", inprocess.ROOT)

from pack.kernels import KERNELS
from pack.kernels._triton import HAS_TRITON, usable

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.json"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}    # about one unit in the last place


def off(kernel, given) -> float:
    """The largest difference from the reference, relative to its largest element; over all outputs."""
    pairs = zip(*(out if isinstance(out, tuple) else (out,) for out in (kernel.fused(**given), kernel.reference(**given))), strict=True)
    return max(((fused.float() - true.float()).abs().max() / true.float().abs().max()).item() for fused, true in pairs)


def cases(small: bool):
    for kernel in KERNELS:
        for case in kernel.cases:
            for dtype in kernel.dtypes if case.small is small else ():
                torch.manual_seed(0)
                yield kernel, case, dtype, kernel.inputs(case.shape, **case.sizes, dtype=dtype, device="cuda" if GPU else "cpu")


def correctness(small: bool) -> list[str]:
    """A line for each case; returns those that are wrong."""
    wrong = []
    for kernel, case, dtype, given in cases(small):
        error = off(kernel, given)
        right = error <= TOLERANCE[dtype]
        line = f"{kernel.name:14} {case.name:34} {str(dtype).removeprefix('torch.'):9} off by {error:.1e}"
        print(line + ("" if right else "   WRONG"), flush=True)
        wrong += [] if right else [line]
    return wrong


def microseconds(call) -> float:
    from triton.testing import do_bench  # it empties the cache of the GPU between calls

    return 1000 * do_bench(call, quantiles=[0.5])


def bytes_per_microsecond() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source))


def timed() -> list[dict]:
    speed, rows = bytes_per_microsecond(), []
    gpu = torch.cuda.get_device_name()
    print(f"\n{gpu}, a copy moves {speed / 1e6:.2f} TB/s")
    for kernel, case, dtype, given in cases(small=False):
        with torch.no_grad():
            reference, fused = (microseconds(lambda run=run, given=given: run(**given)) for run in (kernel.reference, kernel.fused))
        least = kernel.traffic(**given) / speed
        row = {
            "kernel": kernel.name, "case": case.name, "dtype": str(dtype).removeprefix("torch."), "gpu": gpu, "reference_us": round(reference, 2),
            "fused_us": round(fused, 2), "roofline_us": round(least, 2), "speedup": round(reference / fused, 2), "of_roofline": round(least / fused, 3),
        }
        print(f"{row['kernel']:14} {row['case']:34} {row['dtype']:9} {reference:9.1f} -> {fused:8.1f} us, {row['speedup']:5.2f}x,"
              f" {100 * row['of_roofline']:.0f} % of the roofline", flush=True)
        rows.append(row)
    return rows


def main() -> int:
    if not HAS_TRITON:
        print("There is no Triton here, so the kernels are their references in plain torch, and there is nothing to compare.")
        return 0
    if GPU and not usable(torch.device("cuda", torch.cuda.current_device())):
        print("Triton does not run on this GPU, so the kernels are their references in plain torch, and there is nothing to compare.")
        return 0
    if not GPU:
        print("There is no GPU, so nothing is timed; Triton's interpreter shows whether the kernels are right.")
    if wrong := correctness(small=True) + (correctness(small=False) if GPU else []):
        print(f"{len(wrong)} cases are wrong, so nothing is timed.")
        return 1
    if GPU:
        text = json.dumps(timed(), indent=2) + "\n"
        try:
            RESULTS.write_text(text)
            print(f"written to {RESULTS}")
        except OSError as error:
            print(f"{text}{RESULTS} cannot be written ({error.strerror}); the rows stand above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
