"""Chroma and Chroma Radiance: FLUX's blocks, with modulations from one small network for all of them.

Radiance's pixel decoder stands behind the blocks and runs on every step.
"""
from .base import Family
from .flux import DOUBLE, SINGLE, modulated

CHROMA = Family(
    name="chroma",
    models=("comfy.ldm.chroma.model:Chroma", "comfy.ldm.chroma_radiance.model:ChromaRadiance"),
    stacks=(DOUBLE, SINGLE),
    modulated=modulated,
    modulation=("distilled_guidance_layer",),
)
