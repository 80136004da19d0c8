"""Fused kernels in the blocks of FLUX and Z-Image."""
