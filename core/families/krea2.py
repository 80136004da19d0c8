"""Krea 2: one stack over text ++ image ++ references; what fuses the layers of the text encoder runs on every step and is not counted."""
from .base import Family, Stack

KREA2 = Family(
    name="krea2",
    models=("comfy.ldm.krea2.model:SingleStreamDiT",),
    stacks=(Stack("blocks", inputs=("x",), stream="x", returns=("x",), joined=("x",)),),
)
