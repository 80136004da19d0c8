"""Lumina 2 and Z-Image: one stack over caption ++ image tokens; two small refiner stacks run before it on every step."""
from .base import Family, Stack

NEXTDIT = Family(
    name="nextdit",
    model="comfy.ldm.lumina.model:NextDiT",
    stacks=(Stack("layers", inputs=("x",), stream="x", returns=("x",)),),
    always=("noise_refiner", "context_refiner", "siglip_refiner"),
)
