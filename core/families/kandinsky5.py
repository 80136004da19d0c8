"""Kandinsky 5: one stack over the visual tokens; two blocks over the text run before it on every step and are not counted."""
from .base import Family, Stack

KANDINSKY5 = Family(
    name="kandinsky5",
    models=("comfy.ldm.kandinsky5.model:Kandinsky5",),
    stacks=(Stack("visual_transformer_blocks", inputs=("visual_embed",), stream="visual_embed", returns=("visual_embed",), joined=("visual_embed",)),),
)
