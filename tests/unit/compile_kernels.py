"""Compiles what every small case of every kernel launches, for every GPU and without one. Prints one JSON line for each.

A program of its own, as Triton either compiles or interprets in a process, and the other tests need it to interpret.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from testbed import inprocess  # noqa: I001 - the root must be on the path first

inprocess.leave_root()
inprocess.package("pack", ROOT)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from pack.kernels import KERNELS, drift

CAPABILITIES = (80, 86, 89, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Pretended:
    """Stands where the driver of a GPU would, so that a launch goes its whole way up to the GPU."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability      # Triton keeps what it compiled by device

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compiled(kernel, case, dtype, capability: int) -> list:
    """What Triton would run on the GPU. The result of the function means nothing here."""
    made, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **options: made.append(run(self, *args, warmup=True, **options))
    driver.set_active(Pretended(capability))
    try:
        kernel.fused(**kernel.inputs(case.shape, **case.sizes, dtype=dtype, device="cpu"))
    finally:
        JITFunction.run = run
    return made


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory per thread: what does not fit into registers goes there."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    said = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")}


def main(folder: Path) -> None:
    drift.SAMPLE = 200      # so that the small cases have strides
    for capability in CAPABILITIES:
        for kernel in KERNELS:
            for case in (case for case in kernel.cases if case.small):
                for dtype in kernel.dtypes if capability == 89 else (torch.bfloat16,):
                    for made in compiled(kernel, case, dtype, capability):
                        print(json.dumps({
                            "kernel": kernel.name, "case": case.name, "dtype": str(dtype), "capability": capability,
                            "narrow": re.findall(r"^.*(?:tt\.addptr .*i32>*|arith\.muli .*i32>*)(?= loc|$)", made.asm["ttir"], re.M),
                            "loads": sorted(set(re.findall(r"ld\.global\S*", made.asm["ptx"]))), "atomics": made.asm["ttir"].count("atomic"),
                            **resources(made.asm["cubin"], folder)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
