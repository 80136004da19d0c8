"""Fused kernels in the blocks of FLUX and Z-Image."""
from . import rules  # a Deferred asks them

__all__ = ["rules"]
