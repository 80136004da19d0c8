"""Every kernel against plain torch and against the memory's speed.

    python3 dev.py bench kernels                    on a GPU -> results/kernels.json; without one, whether the kernels are right, alone
    python3 dev.py bench kernels --compile-only     what they take on every GPU, without one -> results/kernels-compile.json

A kernel is checked before it is timed, and one that is wrong gets no time. Times are medians. `roofline_us` is what the
bytes that must move would take at the speed of a large copy on the same GPU.
"""
import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

GPU = torch.cuda.is_available() and not os.environ.get("REPRISE_CPU")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"    # before Triton is imported
from benchmarks import _compiled  # noqa: I001
from testbed import inprocess, interpreter

inprocess.leave_root()
inprocess.package("pack", inprocess.ROOT)

from pack.kernels import KERNELS
from pack.kernels._triton import HAS_TRITON, usable
from pack.kernels.spec import faults

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.json"
CACHE = 256 << 20               # bytes, more than the cache of any GPU
FEW, MANY, LONG = 5, 200, 80    # calls at the least and at the most, and milliseconds that they should take
COMPILED = RESULTS.with_name("kernels-compile.json")
COLUMNS = ("kernel", "case", "arch", "registers", "stack_bytes", "local_bytes", "shared_bytes", "instruction")


def given(kernel, case, dtype: torch.dtype, device="cuda" if GPU else "cpu") -> dict:
    """The arguments of a case, the same on every call."""
    torch.manual_seed(0)
    return kernel.inputs(case.shape, **case.sizes, dtype=dtype, device=device)


def cases(small: bool):
    for kernel in KERNELS:
        for case in kernel.cases:
            for dtype in kernel.dtypes if case.small is small else ():
                yield kernel, case, dtype, given(kernel, case, dtype)


def correctness(small: bool) -> list[str]:
    """A line for each case; returns those that are wrong."""
    wrong = []
    for kernel, case, dtype, inputs in cases(small):
        found = faults(kernel, kernel.fused(**inputs), kernel.reference(**inputs), dtype)
        line = f"{kernel.name:22} {case.name:34} {str(dtype).removeprefix('torch.'):9} "
        print(line + (f"WRONG: {'; '.join(found)}" if found else "right"), flush=True)
        wrong += [line] if found else []
    return wrong


def microseconds(call) -> float:
    """The median of calls between which the GPU's cache is emptied."""
    call()
    flush = torch.empty(CACHE, dtype=torch.int8, device="cuda")
    few = between(call, flush, FEW)
    return 1000 * median(between(call, flush, max(FEW, min(MANY, int(LONG / max(median(few), 1e-3))))))


def between(call, flush: torch.Tensor, times: int) -> list[float]:
    """Milliseconds of each of so many calls."""
    stamps = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for begun, ended in stamps:
        flush.zero_()
        begun.record()
        call()
        ended.record()
    torch.cuda.synchronize()
    return [begun.elapsed_time(ended) for begun, ended in stamps]


def bytes_per_microsecond() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source))


def timed_row(kernel, case, dtype: torch.dtype, inputs: dict, speed: float, measure) -> dict:
    """measure: a call -> its microseconds; speed: bytes that memory moves in one."""
    with torch.no_grad():
        reference, fused = (measure(lambda run=run: run(**inputs)) for run in (kernel.reference, kernel.fused))
    least = kernel.traffic(**inputs) / speed
    return {
        "kernel": kernel.name, "case": case.name, "dtype": str(dtype).removeprefix("torch."), "reference_us": round(reference, 2),
        "fused_us": round(fused, 2), "roofline_us": round(least, 2), "speedup": round(reference / fused, 2), "of_roofline": round(least / fused, 3),
    }


def line_of(row: dict) -> str:
    return (f"{row['kernel']:22} {row['case']:34} {row['dtype']:9} {row['reference_us']:9.1f} -> {row['fused_us']:8.1f} us, {row['speedup']:5.2f}x,"
            f" {100 * row['of_roofline']:.0f} % of the roofline")


def timed() -> list[dict]:
    speed, rows = bytes_per_microsecond(), []
    gpu = torch.cuda.get_device_name()
    print(f"\n{gpu}, a copy moves {speed / 1e6:.2f} TB/s")
    for kernel, case, dtype, inputs in cases(small=False):
        row = {**timed_row(kernel, case, dtype, inputs, speed, microseconds), "gpu": gpu}
        print(line_of(row), flush=True)
        rows.append(row)
    return rows


def written(rows: list[dict], file: Path) -> None:
    text = json.dumps(rows, indent=2) + "\n"
    try:
        file.write_text(text)
        print(f"written to {file}")
    except OSError as error:
        print(f"{text}{file} cannot be written ({error.strerror}); the rows stand above")


def compile_only() -> int:
    """What every kernel takes on every GPU at its real sizes in bf16, and which matrix instruction is in it."""
    if reason := _compiled.missing():
        print(f"Nothing can be compiled: {reason}.")
        return 1
    limits, over = {kernel.name: kernel.limits for kernel in KERNELS}, 0
    found = _compiled.rows("table")
    for row in found:
        said = _compiled.broken(row, limits[row["kernel"]])
        over += bool(said)
        print(f"{row['kernel']:22} {row['case']:34} sm_{row['arch']:<4} {row['registers']:4} registers {row['stack_bytes']:3} stack"
              f" {row['local_bytes']:3} local {row['shared_bytes']:6} shared  {row['instruction']}{'   TOO MUCH: ' if said else ''}", *said, flush=True)
    written([{name: row[name] for name in COLUMNS} for row in found], COMPILED)
    return 1 if over else 0


def main(arguments: Sequence[str] = ()) -> int:
    parser = ArgumentParser(prog="dev.py bench kernels", description="Every kernel against plain torch and against the memory's speed.")
    parser.add_argument("--compile-only", action="store_true", help="what the kernels take on every GPU; none is needed")
    if parser.parse_args(arguments).compile_only:
        return compile_only()
    if not HAS_TRITON:
        print("There is no Triton here, so the kernels are their references in plain torch, and there is nothing to compare.")
        return 0
    if GPU and not usable(torch.device("cuda", torch.cuda.current_device())):
        print("Triton does not run on this GPU, so the kernels are their references in plain torch, and there is nothing to compare.")
        return 0
    if not GPU:
        print("There is no GPU, so nothing is timed; Triton's interpreter shows whether the kernels are right.")
        interpreter.round_as_a_gpu_does()
    if wrong := correctness(small=True) + (correctness(small=False) if GPU else []):
        print(f"{len(wrong)} cases are wrong, so nothing is timed.")
        return 1
    if GPU:
        written(timed(), RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
