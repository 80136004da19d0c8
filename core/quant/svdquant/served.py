"""How well a device computes SVDQuant products, told before anything is loaded.

    int4     integer units of 4 bits were in NVIDIA GPUs from Ampere to Ada (compute capability 8.x); later ones run the same
             instructions by others, earlier ones have no such instructions, and on the rest the numbers are unpacked
    nvfp4    units for it are in NVIDIA GPUs from Blackwell on (10.0); elsewhere the weight is unpacked for each product
"""
from __future__ import annotations

from typing import NamedTuple

import comfy_kitchen as ck
import torch

from ..capabilities import capabilities

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
    unpacked = f"SVDQuant int4 has no fast products on {named(device)} ({{why}}): every weight is unpacked for each of them; {INSTEAD}"
    if device.type != "cuda" or torch.version.hip is not None or not kernels("cuda"):
        can = capabilities(device).svdquant
        return Served(NATIVE) if can.fast else Served(EMULATED, unpacked.format(why=can.why))
    # comfy_kitchen's layout calls its CUDA kernels past what the host has switched off, and past their least compute capability
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FIRST:
        return Served(NOT, f"{named(device)} has compute capability {major}.{minor}, and SVDQuant int4 products need 8.0; {INSTEAD}")
    if (major, minor) >= LAST:
        return Served(EMULATED, f"{named(device)} has no int4 units, so SVDQuant int4 products are emulated and slower than int8; {INSTEAD}")
    return Served(NATIVE)


def nvfp4(device: torch.device) -> Served:
    can = capabilities(device).nvfp4
    if can.fast:
        return Served(NATIVE)
    return Served(EMULATED, f"SVDQuant nvfp4 has no fast products on {named(device)} ({can.why}): every weight is unpacked for each of them; {INSTEAD}")


def named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type} device"


def kernels(backend: str) -> bool:
    """Whether comfy_kitchen has this backend's SVDQuant kernels, switched off or not."""
    told = ck.list_backends().get(backend)
    return told is not None and told["available"] and OPERATION in told["capabilities"]
