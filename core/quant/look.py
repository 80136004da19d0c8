"""Looks at the machine that we run on. What a question ends in is told in a phrase, never as a raw error."""
import logging
import os
import platform
from collections.abc import Mapping

import comfy.ldm.modules.attention as host_attention
import comfy.model_management as management
import torch

from ...kernels import _triton
from .attention_backends import BACKENDS, imported
from .machine import INT8, NVFP4, SVDQUANT, Machine

log = logging.getLogger("reprise")

ELSEWHERE = {"SageAttention 3": "sageattn3", "FlashAttention": "flash_attn"}    # that Attention Backend does not offer; ComfyUI has switches for them
HOST_NAMES = {"pytorch": "SDPA", "sage": "SageAttention", "sage3": "SageAttention 3", "flash": "FlashAttention", "xformers": "xformers",
              "sub_quad": "sub-quadratic attention", "split": "split attention"}
COMFYUI_RULES = {       # backends of comfy_kitchen that ComfyUI switches off by itself, and when it does
    "cuda": "ComfyUI switched it off, as it does where torch is not built for CUDA 13 or newer",
    "triton": "ComfyUI switches it on only when started with --enable-triton-backend",
}
BUILDS = {"cuda": ("CUDA", lambda: torch.version.cuda), "hip": ("ROCm", lambda: torch.version.hip)}     # what torch must be built for
NO_HIP = "COMFY_KITCHEN_DISABLE_HIP"


def look(device: torch.device | None = None, compiling: bool = True, importing: bool = True) -> Machine:
    """The machine, with `device` for the models; ComfyUI's if none is given.

    compiling: have Triton compile, once in a process, to see whether it can. importing: import the packages that ComfyUI
    has not imported, to see whether they load; otherwise they are only looked for. Without both it takes no time.
    """
    device = torch.device(device or management.get_torch_device())
    nvidia = device.type == "cuda" and not torch.version.hip
    questions = {
        "gpu": lambda: name_of(device),
        "memory": lambda: memory_of(device),
        "capability": lambda: tuple(torch.cuda.get_device_capability(device)) if nvidia else None,
        "kitchen": kitchen,
        "serves": lambda: serving(device),
        "fp8": lambda: device.type == "cuda" and management.supports_fp8_compute(device),
        "nvfp4": lambda: nvidia and management.supports_nvfp4_compute(device),
        "fp8_weights": lambda: management.supports_cast(device, torch.float8_e4m3fn),
        "triton": lambda: triton_fault(device, compiling),
        "attention": lambda: attention_faults(device, importing),
        "host_attention": host_name,
        "gguf": lambda: fault("gguf", importing),
    }
    answers, failed = {}, []
    for name, question in questions.items():
        try:
            answers[name] = question()
        except _triton.FAILURES as error:
            log.debug("the question for '%s' failed: %r", name, error)
            failed.append(name)
            if name in ("triton", "gguf"):
                answers[name] = "it could not be asked"
    return Machine(system=platform.system(), kind=device.type, torch=torch.__version__.partition("+")[0], cuda=torch.version.cuda,
                   hip=torch.version.hip, tried=compiling, failed=tuple(failed), **answers)


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() if device.type in ("cpu", "mps") else device.type


def memory_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def kitchen() -> Mapping[str, str] | None:
    """Each backend of comfy_kitchen and why it is off; None without comfy_kitchen."""
    module = imported("comfy_kitchen")
    if isinstance(module, str):
        return None
    return {name: why_off(name, state) for name, state in sorted(module.list_backends().items())}


def why_off(name: str, state: Mapping) -> str:
    if state["available"] and not state["disabled"]:
        return ""
    if state["disabled"] and state["available"]:
        return COMFYUI_RULES.get(name, "it was switched off")
    return why_missing(name)


def why_missing(name: str) -> str:
    """Of a backend that comfy_kitchen could not set up, asked in the order in which a user can mend it."""
    if name in BUILDS and BUILDS[name][1]() is None:
        return f"this torch is not built for {BUILDS[name][0]}"
    if name == "hip" and os.environ.get(NO_HIP) == "1":
        return f"{NO_HIP} switches it off"
    if name == "triton" and isinstance(why := imported("triton"), str):
        return f"Triton is {why}"
    if name in (*BUILDS, "triton") and not torch.cuda.is_available():
        return "torch finds no GPU for it"
    module = imported(f"comfy_kitchen.backends.{name}")
    return "it has no kernels for this GPU" if getattr(module, "_EXT_AVAILABLE", False) else "its compiled part does not load here"


def serving(device: torch.device) -> dict[str, str]:
    """Operation of comfy_kitchen -> the backend that would do it on this device. Asked of its own registry, with a tensor of a few bytes."""
    module = imported("comfy_kitchen")
    if isinstance(module, str):
        return {}
    row = torch.empty(1, 256, dtype=torch.float16, device=device)
    asked = {INT8: {"x": row}, NVFP4: {"a": torch.empty(16, 16, dtype=torch.uint8, device=device)}, SVDQUANT[0]: {"x": row},
             SVDQUANT[1]: {"lora_up": row}, SVDQUANT[2]: {"x": row}}
    found = {}
    for operation, arguments in asked.items():
        try:
            found[operation] = module.registry.get_capable_backend(operation, arguments)
        except module.NoCapableBackendError:
            found[operation] = ""
    return found


def triton_fault(device: torch.device, compiling: bool = True) -> str:
    """Why Reprise's kernels do not run, in a phrase."""
    return _triton.hindrance(device) or (_triton.failure(device) if compiling else "")


def attention_faults(device: torch.device, importing: bool = True) -> dict[str, str]:
    """Backend of attention -> why it is not there or does not serve the device."""
    faults = {name: backend.missing(importing) or backend.unable(device) for name, backend in BACKENDS.items()}
    return faults | {name: fault(package, importing) for name, package in ELSEWHERE.items()}


def fault(package: str, importing: bool = True) -> str:
    """Why a package cannot be used."""
    module = imported(package, importing)
    return module if isinstance(module, str) else ""


def host_name() -> str:
    """What the host computes attention with by itself."""
    own = host_attention.optimized_attention
    return next((HOST_NAMES.get(key, key) for key, function in host_attention.REGISTERED_ATTENTION_FUNCTIONS.items() if function is own), "basic attention")
