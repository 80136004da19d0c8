"""AuraFlow: double-stream blocks that return text before image, then single-stream blocks over text ++ image."""
from .base import Family, Stack

AURA = Family(
    name="aura",
    models=("comfy.ldm.aura.mmdit:MMDiT",),
    stacks=(
        Stack("double_layers", inputs=("c", "x"), stream="x", returns=("c", "x"), joined=("c", "x")),
        Stack("single_layers", inputs=("cx",), stream="cx", returns=("cx",), joined=("cx",)),
    ),
    modulation=("double_layers.*.modC", "double_layers.*.modX", "single_layers.*.modCX", "modF"),
)
