"""What was found on a machine, what Reprise will use there, and one line of advice each.

A probe is one function of the machine and one line in PROBES.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..registry import Registry
from .features import CUDA_13, FEATURES, OLDEST, SAGE, TRITON, Feature, helpful
from .machine import EAGER, INT8, NVFP4, SVDQUANT, Capabilities, Machine

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """found: what there is; use: what Reprise uses; advice: what would help, or what to know. A phrase each; all but `use` may be empty."""

    topic: str
    found: str
    use: str
    advice: str = ""

    def line(self) -> str:
        return f"{self.topic}{f': {self.found}' if self.found else ''} -> {self.use}{f'. {self.advice}' if self.advice else ''}"


@dataclass(frozen=True)
class Probe:
    name: str
    look: Callable[[Machine], Finding | None]      # None where there is nothing to say


def capital(phrase: str) -> str:
    return phrase[:1].upper() + phrase[1:]


def advised(advice: str, machine: Machine) -> str:
    return capital(helpful(advice, machine))


def grouped(head: str, faults: Mapping[str, str]) -> str:
    """Those with a fault, by fault: "Off: cuda, hip (why); triton (why)"."""
    whys: dict[str, list[str]] = {}
    for name, why in faults.items():
        if why:
            whys.setdefault(why, []).append(name)
    return head + "; ".join(f"{', '.join(names)} ({why})" for why, names in whys.items()) if whys else ""


def gpu(machine: Machine) -> Finding:
    if machine.kind == "mps":
        return Finding("GPU", f"Apple's, by MPS ({machine.gpu or 'name unknown'})", "plain torch", "The caches gain as much as elsewhere")
    if machine.kind != "cuda":
        what = f"none that ComfyUI uses ({machine.gpu or machine.kind})" if machine.kind == "cpu" else f"{machine.gpu or machine.kind}"
        return Finding("GPU", what, "plain torch", "Fewer evaluations are what helps here: Step Cache")
    told = ", ".join([machine.gpu or "of unknown name", *([f"{machine.memory / GIB:.0f} GiB"] if machine.memory else []), machine.generation or "AMD"])
    if machine.amd:
        return Finding("GPU", told, "comfy_kitchen's ROCm kernels where it has them, else plain torch", "Reprise's own kernels are for NVIDIA GPUs alone")
    able = Capabilities.of(machine)
    units = ", ".join(name for name, has in (("fp8", machine.fp8), ("fp4", machine.nvfp4), ("int8", True)) if has)
    if machine.capability is not None and machine.capability < OLDEST:
        return Finding("GPU", told, "plain torch and comfy_kitchen", "It is older than Ampere, so Reprise's own kernels do not run")
    best = "nvfp4 files" if able.nvfp4.fast else "int8 files, or ones that are made int8 on loading"
    return Finding("GPU", told, f"its {units} units", f"The fastest format for it is {best}" if able.int8.fast or able.nvfp4.fast else "")


def build(machine: Machine) -> Finding:
    made = f"CUDA {machine.cuda}" if machine.cuda else f"ROCm {machine.hip}" if machine.hip else "neither CUDA nor ROCm"
    off = machine.nvidia and (machine.kitchen or {}).get("cuda", "") != ""
    return Finding("torch", f"{machine.torch}, built for {made}, on {machine.system}", f"device {machine.kind}", advised(CUDA_13, machine) if off else "")


def kitchen(machine: Machine) -> Finding:
    if machine.kitchen is None:
        return Finding("comfy_kitchen", "not installed, or it does not load", "none of ComfyUI's quantized formats",
                       "Install comfy-kitchen, which ComfyUI asks for")
    on = [name for name, why in machine.kitchen.items() if not why]
    fast = sorted({machine.serves.get(name, "") for name in (INT8, NVFP4, *SVDQUANT)} - {"", EAGER})
    use = f"its {' and '.join(fast)} kernels" if fast else "its plain torch"
    cuda = machine.nvidia and machine.kitchen.get("cuda", "")
    return Finding("comfy_kitchen", f"on: {', '.join(on) or 'nothing'}{grouped('; off: ', machine.kitchen)}", use, advised(CUDA_13, machine) if cuda else "")


def triton(machine: Machine) -> Finding:
    if machine.triton:
        return Finding("Triton", machine.triton, "plain torch in the place of Reprise's kernels", advised(TRITON, machine))
    return Finding("Triton", "works" if machine.tried else "installed; whether it can compile shows when a kernel is first needed", "Reprise's kernels")


def attention(machine: Machine) -> Finding:
    there = [name for name, why in machine.attention.items() if not why and name != "SDPA"]
    able = Capabilities.of(machine).attention
    found = f"{', '.join([*there, 'SDPA'])}; ComfyUI itself uses {machine.host_attention}{grouped('; not there: ', machine.attention)}"
    use = f"{able.by} where the node Attention Backend is" if able.fast else f"ComfyUI's own, {machine.host_attention}"
    return Finding("attention", found, use, "" if able.fast else advised(SAGE, machine))


def gguf(machine: Machine) -> Finding:
    if machine.gguf:
        return Finding("gguf package", machine.gguf, "GGUF files cannot be opened", "Install gguf with ComfyUI's pip")
    return Finding("gguf package", "installed", "GGUF files can be opened")


def questions(machine: Machine) -> Finding | None:
    if not machine.failed:
        return None
    return Finding("questions", f"no answer to {', '.join(machine.failed)}", "what is always there in their place",
                   "Restart ComfyUI; if it stays so, report it with this text")


def of_feature(feature: Feature) -> Probe:
    def look(machine: Machine) -> Finding:
        way = feature.on(machine)
        return Finding(feature.name, "", way.by, "; ".join(part for part in (capital(way.cost_on(machine)), helpful(way.advice, machine)) if part))
    return Probe(feature.name, look)


PROBES = Registry(
    "probe",
    Probe("GPU", gpu),
    Probe("torch", build),
    Probe("comfy_kitchen", kitchen),
    Probe("Triton", triton),
    Probe("attention", attention),
    Probe("gguf package", gguf),
    Probe("questions", questions),
    *(of_feature(feature) for feature in FEATURES.values()),
)


def findings(machine: Machine) -> list[Finding]:
    return [finding for probe in PROBES.values() if (finding := probe.look(machine)) is not None]
