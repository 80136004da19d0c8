"""Two sections of `bench gpu`: every kernel against its floor, and int8 products against all others there are.

A kernel is checked before it is timed, and one that is wrong gets no time.
"""
import comfy_kitchen as ck
import torch
from torch import Tensor

from benchmarks import kernels
from benchmarks._gpu_peers import HOST, PEERS
from pack.kernels import KERNELS, _triton
from pack.kernels.int8_linear import INT8_LINEAR
from pack.kernels.quantize import quantize_rows
from pack.kernels.spec import faults

FP8 = torch.float8_e4m3fn
LARGEST = 448.0     # of it


def run(bench) -> None:
    """Each kernel at its real sizes, in the type that the models are in."""
    device, speed = bench.meter.device, bench.tried({"speed": "of a large copy"}, bench.meter.copy_speed)
    if speed is None:
        return
    bench.record.set(copy_tb_per_s=round(speed / 1e6, 3))
    bench.say(f"  a large copy moves {speed / 1e6:.2f} TB/s")
    if why := without_triton(bench):
        bench.leave({"kernel": "all of them"}, why)
        return
    for kernel in KERNELS:
        for case in kernel.cases:
            if case.small is bench.sizes.small_kernels:
                dtype = kernel.dtypes[-1]
                heading = {"kernel": kernel.name, "case": case.name}
                bench.row(heading, lambda k=kernel, c=case, d=dtype: timed(k, c, d, device, speed, bench.meter.microseconds), line)
        bench.release()


def without_triton(bench) -> str:
    """Why Reprise's kernels are plain torch here; nothing where they are not. Tests interpret them."""
    device = bench.meter.device
    return "" if bench.sizes.small_kernels else _triton.hindrance(device) or _triton.failure(device)


def timed(kernel, case, dtype: torch.dtype, device: torch.device, speed: float, measure) -> dict:
    inputs = kernels.given(kernel, case, dtype, device)
    wrong = faults(kernel, kernel.fused(**inputs), kernel.reference(**inputs), dtype)
    if wrong:
        raise ArithmeticFault("; ".join(wrong))
    row = kernels.timed_row(kernel, case, dtype, inputs, speed, measure)
    row["bytes"] = kernel.traffic(**inputs)
    host = HOST.get(kernel.name)
    row["host_us"] = row["reference_us"] if host is None else round(measure(lambda: host(**inputs)), 2)
    row["host_is"] = "the reference" if host is None else "its operations"
    peer = PEERS.get(kernel.name, lambda **given: None)(**inputs)
    row["kitchen_us"] = None if peer is None else round(measure(peer), 2)
    return {name: value for name, value in row.items() if name not in ("kernel", "case")}


class ArithmeticFault(RuntimeError):
    """A kernel is not what its reference is."""


def line(row: dict) -> str:
    kitchen = f", comfy_kitchen {row['kitchen_us']:.1f}" if row["kitchen_us"] is not None else ""
    return (f"{row['fused_us']:.1f} us, {100 * row['of_roofline']:.0f} % of the copy's speed;"
            f" host {row['host_us']:.1f}{kitchen}, reference {row['reference_us']:.1f}")


# products --------------------------------------------------------------------------------------------------------------
def run_products(bench) -> None:
    """y = x w^T at the shapes of FLUX and Z-Image: floating point operations in a second, for each way to multiply."""
    why = without_triton(bench)
    for M, N, K in bench.sizes.products:
        floor = None        # microseconds of the sums alone
        for name, way in WAYS.items():
            heading = {"shape": f"{M} x {K} x {N}", "way": name}
            if why and name in (OWN, OWN_FROM_BF16):
                bench.leave(heading, why)
                continue
            row = bench.row(heading, lambda way=way, M=M, N=N, K=K, least=floor if "int8" in name else None: product(way, M, N, K, bench.meter, least), line_of)
            floor = row["us"] if row and name == SUMS else floor
        bench.release()


def product(way, M: int, N: int, K: int, meter, least: float | None = None) -> dict:
    """least: microseconds of cuBLAS for the sums of the same codes, the floor of what int8 products cost."""
    torch.manual_seed(0)
    call = way(Operands(M, N, K, meter.device))
    call()
    us = meter.microseconds(call)
    return {"us": round(us, 2), "tops": round(2 * M * N * K / us / 1e6, 1), "of_sums": None if least is None else round(least / us, 3)}


def line_of(row: dict) -> str:
    floor = "" if row["of_sums"] is None else f", {100 * row['of_sums']:.0f} % of the sums' speed"
    return f"{row['us']:.1f} us, {row['tops']:.0f} TOPS{floor}"


class Operands:
    """x [M, K] and w [N, K] in what a product wants them in."""

    def __init__(self, M: int, N: int, K: int, device: torch.device):
        self.shape, self.device = (M, N, K), device

    def floats(self, rows: int) -> Tensor:
        return torch.randn(rows, self.shape[2], device=self.device, dtype=torch.bfloat16)

    def codes(self) -> dict:
        """As the int8 kernel takes them."""
        M, N, K = self.shape
        return INT8_LINEAR.inputs((M, N), K=K, dtype=torch.bfloat16, device=self.device)


def bf16(given: Operands):
    x, w = given.floats(given.shape[0]), given.floats(given.shape[1])
    return lambda: torch.nn.functional.linear(x, w)


def int_mm(given: Operands):
    codes = given.codes()
    x, w = codes["x"], codes["weight"].T
    return lambda: torch._int_mm(x, w)


def scaled_mm(fast: bool):
    def way(given: Operands):
        x, w = ((given.floats(rows).clamp(-4, 4) * (LARGEST / 4)).to(FP8) for rows in given.shape[:2])
        scale = torch.full((), 4 / LARGEST, device=given.device)
        return lambda: torch._scaled_mm(x, w.T, scale, scale, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return way


def own(given: Operands):
    codes = given.codes()
    wrong = faults(INT8_LINEAR, INT8_LINEAR.op(**codes), INT8_LINEAR.reference(**codes), torch.bfloat16)
    if wrong:
        raise ArithmeticFault("; ".join(wrong))
    return lambda: INT8_LINEAR.op(**codes)


def own_from_bf16(given: Operands):
    codes, x = given.codes(), given.floats(given.shape[0])

    def call():
        rows, scales = quantize_rows(x, True)
        return INT8_LINEAR.op(**{**codes, "x": rows, "x_scales": scales.reshape(-1)})
    return call


def kitchen_from_bf16(given: Operands):
    codes, x = given.codes(), given.floats(given.shape[0])
    scales = codes["weight_scales"].unsqueeze(1)
    return lambda: ck.int8_linear(x, codes["weight"], scales, codes["bias"], torch.bfloat16, convrot=True, convrot_groupsize=256)


SUMS = "torch._int_mm, sums alone"
OWN, OWN_FROM_BF16, KITCHEN_FROM_BF16 = "Reprise int8", "Reprise int8 from bf16, rotated", "comfy_kitchen int8 from bf16, rotated"
WAYS = {
    "bf16": bf16,
    SUMS: int_mm,
    "fp8 scaled_mm": scaled_mm(False),
    "fp8 scaled_mm, fast accumulation": scaled_mm(True),
    OWN: own,
    OWN_FROM_BF16: own_from_bf16,
    KITCHEN_FROM_BF16: kitchen_from_bf16,
}
