"""How well a device computes SVDQuant products, told before anything is loaded.

    int4     integer units of 4 bits were in NVIDIA GPUs from Ampere to Ada (compute capability 8.x); later ones run the same
             instructions by others, earlier ones have no such instructions, and on the rest the numbers are unpacked
    nvfp4    units for it are in NVIDIA GPUs from Blackwell on (10.0); elsewhere the weight is unpacked for each product
"""
from __future__ import annotations

from typing import NamedTuple

import comfy.model_management
import comfy_kitchen as ck
import torch

NATIVE, EMULATED, NOT = "native", "emulated", "not at all"
OPERATION = "scaled_mm_svdquant_w4a4"
FIRST, LAST = (8, 0), (9, 0)     # capabilities with int4 units: from, up to
INSTEAD = "choose compute int8 in Quantized Model Loader, which turns the layers into int8 when the file is opened"


class Served(NamedTuple):
    """how: NATIVE, EMULATED or NOT. sentence: for the user, "" where it is native."""

    how: str
    sentence: str = ""


def served(device: torch.device, kind: str) -> Served:
    """kind: "int4" or "nvfp4"."""
    return {"int4": int4, "nvfp4": nvfp4}[kind](device)


def int4(device: torch.device) -> Served:
    if device.type != "cuda":
        return Served(EMULATED, f"SVDQuant int4 has no fast products on the {device.type} device: every weight is unpacked for each of them; {INSTEAD}")
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        if kernels("hip", even_disabled=False):
            return Served(NATIVE)
        return Served(EMULATED, f"comfy_kitchen has no SVDQuant kernels for {name}: every weight is unpacked for each product; {INSTEAD}")
    if not kernels("cuda", even_disabled=True):     # its layout calls them past what the host has switched off
        return Served(EMULATED, f"comfy_kitchen's CUDA kernels are not installed: SVDQuant int4 weights are unpacked for each product; {INSTEAD}")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FIRST:
        return Served(NOT, f"{name} has compute capability {major}.{minor}, and SVDQuant int4 products need 8.0; {INSTEAD}")
    if (major, minor) >= LAST:
        return Served(EMULATED, f"{name} has no 4-bit integer units, so SVDQuant int4 products are emulated and slower than int8; {INSTEAD}")
    return Served(NATIVE)


def nvfp4(device: torch.device) -> Served:
    if device.type != "cuda":
        return Served(EMULATED, f"SVDQuant nvfp4 has no fast products on the {device.type} device: every weight is unpacked for each of them; {INSTEAD}")
    if not comfy.model_management.supports_nvfp4_compute(device):
        name = torch.cuda.get_device_name(device)
        return Served(EMULATED, f"{name} has no nvfp4 units, which the RTX 50 series has: every weight is unpacked for each product; {INSTEAD}")
    return Served(NATIVE)


def kernels(backend: str, even_disabled: bool) -> bool:
    """Whether comfy_kitchen has this backend's SVDQuant kernels."""
    told = ck.list_backends().get(backend)
    return told is not None and told["available"] and (even_disabled or not told["disabled"]) and OPERATION in told["capabilities"]
