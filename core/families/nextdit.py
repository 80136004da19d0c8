"""Lumina 2, Z-Image and its pixel-space kin: one stack over caption ++ image tokens.

Two small refiner stacks run before it on every step. The host hands the blocks' input to patches after each block.
"""
from .base import Family, Stack

NEXTDIT = Family(
    name="nextdit",
    models=("comfy.ldm.lumina.model:NextDiT", "comfy.ldm.lumina.model:NextDiTPixelSpace"),
    stacks=(Stack("layers", inputs=("x", "x_mask", "freqs_cis", "adaln_input"), stream="x", returns=("x",), joined=("x",)),),
    always=("noise_refiner", "context_refiner", "siglip_refiner"),
    modulated=lambda block, argument: argument("adaln_input"),      # TeaCache takes the time embedding here
    modulation=("layers.*.adaLN_modulation", "noise_refiner.*.adaLN_modulation", "final_layer.adaLN_modulation"),
)
