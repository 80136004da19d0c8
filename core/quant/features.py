"""What each feature does on a machine: who does the work there, and what that costs against the best way.

The Doctor tells it of the machine it runs on, the README of the usual ones; both read these records.
A step is one of FLUX.1 at 1024 x 1024; *modelled* is from the bytes and operations of its layers, timed by nobody.
"""
from collections.abc import Callable
from dataclasses import dataclass

from ..registry import Registry
from .machine import KITCHEN, KITCHEN_INT8, OWN_GGUF, PLAIN, SAGE_1, SAGE_2, Capabilities, Machine, svdquant


@dataclass(frozen=True)
class Way:
    """by: who does the work, in a few words; costs: what that costs, empty for the best way; advice: what would change it.

    timed: the part of the costs that was found on an NVIDIA GPU, which it names.
    """

    by: str
    costs: str = ""
    advice: str = ""
    timed: str = ""

    @property
    def cost(self) -> str:
        return "; ".join(part for part in (self.timed, self.costs) if part)

    def cost_on(self, machine: Machine) -> str:
        """The cost as it is told there: figures of GPUs say nothing of other machines."""
        return self.cost if machine.nvidia else self.costs


@dataclass(frozen=True)
class Feature:
    name: str
    ways: dict[str, Way]                    # the best first
    pick: Callable[[Machine], str]          # the key of the way that a machine goes

    def on(self, machine: Machine) -> Way:
        return self.ways[self.pick(machine)]

    @property
    def falls_back(self) -> list[Way]:
        """The ways that cost something."""
        return [way for way in self.ways.values() if way.cost]


CUDA_13 = "install a torch that is built for CUDA 13"
TRITON = "install Triton (on Windows the package triton-windows)"
SAGE = "install SageAttention 2"
OLDEST = (8, 0)     # the compute capability from which on Triton kernels and SageAttention run


def helpful(advice: str, machine: Machine) -> str:
    """The advice, where this machine can follow it."""
    if advice in (CUDA_13, TRITON, SAGE) and not machine.nvidia:
        return ""
    return "" if advice in (TRITON, SAGE) and machine.capability is not None and machine.capability < OLDEST else advice


def by_triton(machine: Machine) -> str:
    return "torch" if machine.triton else "triton"


def by_fused(machine: Machine) -> str:
    if not machine.triton:
        return "triton"
    return "kitchen" if by_int8(machine) == "cuda" else "torch"


def by_int8(machine: Machine) -> str:
    by = Capabilities.of(machine).int8.by
    if not by.startswith(KITCHEN):
        return "torch" if by == PLAIN else "own"
    return backend if (backend := by.removeprefix(KITCHEN)) in ("hip", "triton") else "cuda"


def by_fp8(machine: Machine) -> str:
    if machine.fp8:
        return "units"
    return "cast" if machine.fp8_weights else "wide"


def by_nvfp4(machine: Machine) -> str:
    if Capabilities.of(machine).nvfp4.fast:
        return "units"
    return "emulated" if machine.fp8_weights else "slow"


def by_svdquant(machine: Machine) -> str:
    route = svdquant(machine)
    if route.fast:
        return "hip" if machine.amd else "units"
    return "torch" if route.by == PLAIN else "emulated"


def by_gguf(machine: Machine) -> str:
    if machine.gguf:
        return "none"
    return "triton" if not machine.triton and any(name.startswith(OWN_GGUF) for name in machine.kernels) else "torch"


def by_attention(machine: Machine) -> str:
    route = Capabilities.of(machine).attention
    return route.by if route.fast else "own"


def the_same(machine: Machine) -> str:
    return "torch"


FEATURES = Registry(
    "feature",
    Feature("Step Cache", {
        "triton": Way("a fused Triton kernel"),
        "torch": Way("plain torch", "a skipped step goes through memory two or three times as often, still far less than a computed one does", TRITON),
    }, by_triton),
    Feature("Reference caches, Modulation Cache", {"torch": Way("plain torch")}, the_same),
    Feature("int8 layers", {
        "cuda": Way("comfy_kitchen's CUDA kernels"),
        "hip": Way("comfy_kitchen's ROCm kernels"),
        "triton": Way("comfy_kitchen's Triton kernels", timed="5% slower than its CUDA kernels, measured by its authors on an RTX 5090"),
        "own": Way("Reprise's Triton kernel", "not timed against comfy_kitchen's CUDA kernels yet", CUDA_13),
        "torch": Way("plain torch", "the memory is as small", CUDA_13, timed="on an A100 three times as slow as fp8, a user reports"),
    }, by_int8),
    Feature("fp8 layers", {
        "units": Way("fp8 units, for scaled files"),
        "cast": Way("cast to 16 bits, layer by layer", "the speed of 16 bits; the memory is as small"),
        "wide": Way("16 bits from loading on", "twice the memory, the speed of 16 bits; scaled files may not load, as the device holds no 8-bit floats"),
    }, by_fp8),
    Feature("nvfp4 and mxfp8 layers", {
        "units": Way("fp4 and fp8 units"),
        "emulated": Way("unpacked to 16 bits, layer by layer", "slower than 16 bits by the unpacking; the memory is as small"),
        "slow": Way("not to be expected", "their scales are 8-bit floats, which the device does not hold; take a GGUF or a 16-bit file"),
    }, by_nvfp4),
    Feature("SVDQuant int4 layers", {
        "units": Way("int4 units, by comfy_kitchen"),
        "hip": Way("comfy_kitchen's ROCm kernels"),
        "emulated": Way("comfy_kitchen, int4 emulated", "not timed; expect no gain over int8, as the GPU has no int4 units; the memory is as small",
                        "on RTX 50 take the model's nvfp4 file, on others int8"),
        "torch": Way("plain torch", "not timed; unpacked on every call, so slower than 16 bits; the memory is as small", CUDA_13),
    }, by_svdquant),
    Feature("GGUF layers", {
        "triton": Way("Reprise's Triton kernels"),
        "torch": Way("unpacked by plain torch", advice=TRITON,
                     timed="27 (Q8_0) to 185 ms (Q3_K) of a step on an RTX 4090, fused kernels 12 to 26 (modelled)"),
        "none": Way("none: the gguf package is missing", "GGUF files cannot be opened", "pip install gguf"),
    }, by_gguf),
    Feature("Attention Backend", {
        SAGE_2: Way(SAGE_2),
        KITCHEN_INT8: Way(KITCHEN_INT8),
        SAGE_1: Way(SAGE_1),
        "own": Way("ComfyUI's own attention", "it is full precision", SAGE, timed="272 instead of 217 ms for an int8 step on an RTX 4090 (modelled)"),
    }, by_attention),
    Feature("Fused Kernels", {
        "triton": Way("Triton kernels"),
        "kitchen": Way("GELU in comfy_kitchen's int8 product alone", advice=TRITON,
                       timed="more than 214 of 272 ms for an int8 step on an RTX 4090 (modelled)"),
        "torch": Way("off", advice=TRITON, timed="272 instead of 214 ms for an int8 step on an RTX 4090 (modelled)"),
    }, by_fused),
)
