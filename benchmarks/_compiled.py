"""Compiles what every case of every kernel launches, for every GPU and without one. Prints one JSON line for each.

    python -m benchmarks._compiled FOLDER [table]       FOLDER for what the tools need; table: large cases alone, in bf16

A program of its own, as Triton either compiles or interprets in a process. `bench kernels --compile-only` and the tests run it.
"""
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
THOROUGH = 89       # here small cases too, in fp32, and large ones in fp32 and bf16; elsewhere large ones in bf16
REDUCING = ("arith.remsi", "arith.remui", "arith.andi")     # of something by a constant: below that
MATRIX = r"[HIQO](?:G?MMA)(?:\.[\w.]+)?|UTC[HIQO]MMA(?:\.[\w.]+)?|UTMALDG(?:\.\w+)*"


def missing() -> str:
    """Why nothing can be compiled here; nothing where it can."""
    found = importlib.util.find_spec("triton")
    if found is None:
        return "there is no Triton on this system"
    tools = Path(found.origin).parent / "backends" / "nvidia" / "bin"
    gone = [tool for tool in ("ptxas", "cuobjdump", "nvdisasm") if not list(tools.glob(f"{tool}*"))]
    return f"this Triton comes without {', '.join(gone)}" if gone else ""


def rows(*arguments: str) -> list[dict]:
    """What this program prints, from a process of its own with an empty cache. RuntimeError where a kernel does not compile."""
    with tempfile.TemporaryDirectory(prefix="reprise-") as folder:
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(Path(folder) / "cache")}
        command = [sys.executable, "-m", "benchmarks._compiled", folder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=1800, check=False)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def broken(row: dict, limits) -> list[str]:
    """What a row has beyond the limits of its kernel."""
    arch, said = row["arch"], []
    for name in ("stack_bytes", "local_bytes"):
        if row[name]:
            said.append(f"{name} is {row[name]}, and registers must hold everything")
    for name in ("registers", "shared_bytes"):
        if arch not in limits.unlimited and row[name] > getattr(limits, name):
            said.append(f"{name} is {row[name]}, more than {getattr(limits, name)}")
    if row["scratch_bytes"]:
        said.append(f"it wants {row['scratch_bytes']} bytes of scratch, which takes an allocator for the whole process")
    has = row["instruction"].split()
    if not row["looked_into"]:
        return said
    return said + [f"no {wanted} in it" for wanted in limits.instructions.get(arch, ()) if not any(one.startswith(wanted) for one in has)]


def wanted(kernel, case, arch: int) -> tuple:
    """The types that a case is compiled in. fp16 and bf16 differ in a conversion."""
    if case.small:
        return kernel.dtypes[:1] if arch == THOROUGH else ()
    return tuple(dict.fromkeys((kernel.dtypes[0], kernel.dtypes[-1]))) if arch == THOROUGH else kernel.dtypes[-1:]


def narrow(ttir: str) -> list[str]:
    """Lines that compute addresses in 32 bits from something that no constant bounds, such as a row or a size: large tensors would wrap round."""
    bounded, found = set(), []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w$.-]+) = \"?([\w.]+)\"?(.*)", line)
        if match is None:
            continue
        name, op, rest = match.groups()
        used = re.findall(r"%[\w$.-]+", rest)
        if op == "tt.addptr":
            if used[-1] not in bounded and re.search(r"i32>*(?= loc|$)", line):
                found.append(line.strip())
        elif op in ("arith.constant", "tt.make_range") or op in REDUCING and used[-1] in bounded:
            bounded.add(name)
        elif op.startswith(("arith.", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")) and used and all(one in bounded for one in used):
            bounded.add(name)
        elif op == "arith.muli" and re.search(r"i32>*(?= loc|$)", line):
            found.append(line.strip())
    return found


def main(folder: Path, options: list[str]) -> None:
    from testbed import inprocess

    inprocess.leave_root()
    inprocess.package("pack", ROOT)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from pack.kernels import KERNELS, drift

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    class Pretended:
        """Stands where the driver of a GPU would, so that a launch goes its whole way up to the GPU."""

        def __init__(self, arch: int):
            self.arch = arch

        def get_current_device(self) -> int:
            return self.arch        # Triton keeps what it compiled by device

        def get_current_stream(self, device) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.arch, 32)

    def compiled(kernel, case, dtype, arch: int) -> list:
        """What Triton would run on the GPU. The result of the function means nothing here. The sizes of large cases need no memory."""
        made, run = [], JITFunction.run
        JITFunction.run = lambda self, *args, warmup, **options: made.append(run(self, *args, warmup=True, **options))
        driver.set_active(Pretended(arch))
        try:
            kernel.fused(**kernel.inputs(case.shape, **case.sizes, dtype=dtype, device="cpu" if case.small else "meta"))
        finally:
            JITFunction.run = run
        return made

    def looked_at(made, instructions: bool) -> dict:
        """Registers, and bytes of stack and of local memory, per thread: what does not fit into registers goes there; and the matrix `instructions`."""
        file = folder / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        tool = lambda option: subprocess.run([tools / "cuobjdump", option, file], capture_output=True, text=True, check=True).stdout
        usage = tool("--dump-resource-usage")
        registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        found = re.findall(rf"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?({MATRIX})\s", tool("-sass"), re.M) if instructions else []
        return {"registers": registers, "stack_bytes": stack, "local_bytes": local, "shared_bytes": made.metadata.shared,
                "scratch_bytes": made.metadata.global_scratch_size, "looked_into": instructions, "instruction": " ".join(sorted(set(found)))}

    drift.SAMPLE = 200      # so that the small cases have strides
    known = {}
    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            for case in kernel.cases:
                for dtype in wanted(kernel, case, 0 if "table" in options else arch):
                    for made in compiled(kernel, case, dtype, arch):
                        if made.hash not in known:
                            # taking a large product apart takes as long as compiling it, and its types multiply alike
                            known[made.hash] = looked_at(made, "tt.dot" in made.asm["ttir"] and dtype is kernel.dtypes[-1])
                        print(json.dumps({
                            "kernel": kernel.name, "case": case.name, "dtype": str(dtype), "arch": arch, **known[made.hash],
                            "narrow": narrow(made.asm["ttir"]),
                            "loads": sorted(set(re.findall(r"ld\.global\S*", made.asm["ptx"]))), "atomics": made.asm["ttir"].count("atomic"),
                        }), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
