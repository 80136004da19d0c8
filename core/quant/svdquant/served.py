"""How well a device computes SVDQuant products, told before anything is loaded. Who computes them is told in machine.py, as the Doctor has it.

    int4     integer units of 4 bits were in NVIDIA GPUs from Ampere to Ada (compute capability 8.x); later ones run the same
             instructions by others, and where comfy_kitchen has no kernels, or they are switched off, the numbers are unpacked
    nvfp4    units for it are in NVIDIA GPUs from Blackwell on (10.0); elsewhere the weight is unpacked for each product
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from ..capabilities import Route, capabilities
from ..machine import PLAIN

NATIVE, EMULATED = "native", "emulated"
INSTEAD = "choose compute int8 in Quantized Model Loader, which turns the layers into int8 when the file is opened"


class Served(NamedTuple):
    """how: NATIVE or EMULATED. sentence: for the user, "" where it is native."""

    how: str
    sentence: str = ""


def served(device: torch.device, kind: str) -> Served:
    """kind: "int4" or "nvfp4"."""
    return {"int4": int4, "nvfp4": nvfp4}[kind](device)


def int4(device: torch.device) -> Served:
    can = capabilities(device).svdquant
    if can.fast:
        return Served(NATIVE)
    if can.by == PLAIN:
        return unpacked("int4", device, can)
    return Served(EMULATED, f"{named(device)} has no int4 units, so SVDQuant int4 products are emulated and slower than int8; {INSTEAD}")


def nvfp4(device: torch.device) -> Served:
    can = capabilities(device).nvfp4
    return Served(NATIVE) if can.fast else unpacked("nvfp4", device, can)


def unpacked(kind: str, device: torch.device, can: Route) -> Served:
    return Served(EMULATED, f"SVDQuant {kind} has no fast products on {named(device)} ({can.why}): every weight is unpacked for each of them; {INSTEAD}")


def named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type} device"
