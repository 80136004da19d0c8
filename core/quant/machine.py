"""A machine, as far as it matters here: facts that were found, and what follows from them.

`look.py` finds the facts; nothing here asks torch, the host or the GPU, so that any machine can be described.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ...kernels import KERNELS

INT8 = "int8_linear"            # operations of comfy_kitchen
NVFP4 = "scaled_mm_nvfp4"
SVDQUANT = ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4", "gemv_awq_w4a16")
EAGER = "eager"                 # comfy_kitchen's backend that is plain torch
PLAIN, KITCHEN = "plain torch", "comfy_kitchen "    # who does the work, and how the names of comfy_kitchen's backends begin
OWN_INT8 = "int8 linear"        # names of Reprise's kernels
OWN_GGUF = "gguf"               # and how those begin that unpack GGUF
INT4_UNITS = (8,)               # first numbers of the compute capabilities with int4 matrix units: RTX 30 and 40, A100
SAGE_2, SAGE_1, KITCHEN_INT8 = "SageAttention 2", "SageAttention 1", "comfy_kitchen int8"
EIGHT_BIT_ATTENTION = (SAGE_2, KITCHEN_INT8, SAGE_1)    # the order in which they are preferred


@dataclass(frozen=True)
class Machine:
    system: str = "Linux"                           # as Python's platform.system()
    kind: str = "cpu"                               # of torch's device: cuda, which AMD's are too, mps, xpu, cpu
    gpu: str = ""                                   # its name
    memory: int = 0                                 # bytes of the GPU
    capability: tuple[int, int] | None = None       # compute capability, of an NVIDIA GPU
    torch: str = ""
    cuda: str | None = None                         # that torch was built with
    hip: str | None = None
    kitchen: Mapping[str, str] | None = None        # backend of comfy_kitchen -> why it is off, empty where it is on; None without comfy_kitchen
    serves: Mapping[str, str] = field(default_factory=dict)     # operation -> the backend that would do it on this device
    fp8: bool = False                               # whether the host multiplies in this format here
    nvfp4: bool = False
    fp8_weights: bool = True                        # whether the device can hold them
    triton: str = ""                                # why Reprise's kernels do not run, empty where they do
    tried: bool = True                              # False: Triton is there, and nobody has asked it to compile yet
    kernels: frozenset[str] = frozenset(kernel.name for kernel in KERNELS)      # Reprise's
    attention: Mapping[str, str] = field(default_factory=dict)  # backend of attention -> why not, empty where it works
    host_attention: str = "SDPA"                    # what the host uses by itself
    gguf: str = ""                                  # why GGUF files cannot be read, empty where they can
    failed: tuple[str, ...] = ()                    # facts that could not be found out, by the names above

    @property
    def nvidia(self) -> bool:
        return self.kind == "cuda" and not self.hip

    @property
    def amd(self) -> bool:
        return self.kind == "cuda" and bool(self.hip)

    @property
    def generation(self) -> str:
        """sm_89 and the like; empty for what is no NVIDIA GPU."""
        return "" if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"


class Route(NamedTuple):
    """How a kind of work is done. by: who does it; fast: on units made for it; why: what stands in the way of a faster one, in a phrase."""

    by: str
    fast: bool
    why: str = ""


@dataclass(frozen=True)
class Capabilities:
    """What other code asks of a machine."""

    triton: Route       # Reprise's kernels
    int8: Route         # linear layers in int8
    fp8: Route          # linear layers in fp8
    nvfp4: Route
    svdquant: Route     # int4 with a low-rank branch
    attention: Route    # in 8 bits

    @classmethod
    def of(cls, machine: Machine) -> "Capabilities":
        return cls(*(decide(machine) for decide in (triton, int8, fp8, nvfp4, svdquant, attention)))


def triton(machine: Machine) -> Route:
    return Route(PLAIN, False, machine.triton) if machine.triton else Route("Triton", True)


def int8(machine: Machine) -> Route:
    backend = machine.serves.get(INT8, "")
    if backend not in ("", EAGER):
        return Route(KITCHEN + backend, True)
    why = kitchen_off(machine)
    if not machine.triton and OWN_INT8 in machine.kernels:
        return Route("Reprise's Triton kernel", True, why)
    return Route(PLAIN, False, f"{why}; {machine.triton}" if machine.nvidia and machine.triton else why)


def fp8(machine: Machine) -> Route:
    if machine.fp8:
        return Route("torch's fp8 product", True)
    return Route("16 bits", False, "the GPU has no fp8 units" if machine.kind == "cuda" else f"ComfyUI has no fp8 product for {machine.kind}")


def nvfp4(machine: Machine) -> Route:
    if not machine.nvfp4:
        return Route("16 bits", False, "only NVIDIA GPUs from Blackwell (RTX 50) on have fp4 units")
    backend = machine.serves.get(NVFP4, "")
    if backend in ("", EAGER):
        return Route("16 bits", False, kitchen_off(machine))
    return Route(KITCHEN + backend, True)


def svdquant(machine: Machine) -> Route:
    backends = {machine.serves.get(operation, "") for operation in SVDQUANT}
    if backends & {"", EAGER}:
        return Route(PLAIN, False, kitchen_off(machine))
    [backend] = backends if len(backends) == 1 else [", ".join(sorted(backends))]
    if machine.nvidia and (machine.capability or (0, 0))[0] not in INT4_UNITS:
        return Route(f"{KITCHEN}{backend}, emulated", False, "the GPU has no int4 units, which RTX 30 and 40 have")
    return Route(KITCHEN + backend, True)


def attention(machine: Machine) -> Route:
    works = [name for name in EIGHT_BIT_ATTENTION if machine.attention.get(name) == ""]
    if works:
        return Route(works[0], True)
    return Route(machine.host_attention, False, "; ".join(dict.fromkeys(machine.attention.get(name, "not looked for") for name in EIGHT_BIT_ATTENTION)))


def kitchen_off(machine: Machine) -> str:
    """Why comfy_kitchen's fast backend for this machine does not serve, in a phrase."""
    if machine.kitchen is None:
        return "comfy_kitchen is not installed"
    if machine.nvidia or machine.amd:
        name = "hip" if machine.amd else "cuda"
        why = machine.kitchen.get(name, "it is not part of it")
        return f"comfy_kitchen's {name} backend is off: {why}" if why else f"comfy_kitchen's {name} backend has no kernel for this GPU"
    return f"comfy_kitchen has no kernels for {machine.kind}"
