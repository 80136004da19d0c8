"""What a device can do, for loaders and nodes that choose a way by it.

    capabilities(device).int8.fast      whether linear layers in int8 are faster there than in 16 bits
    capabilities(device).svdquant.why   what stands in the way, in a phrase for a sentence
"""
import torch

from .look import look
from .machine import Capabilities, Route

__all__ = ["Capabilities", "Route", "capabilities"]


def capabilities(device: torch.device | None = None, compiling: bool = True) -> Capabilities:
    """Of `device`, ComfyUI's if none is given. compiling: have Triton compile, once in a process, rather than take for granted that it can."""
    return Capabilities.of(look(device, compiling, importing=False))
