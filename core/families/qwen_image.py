"""Qwen-Image, its edit and layered kin: double-stream blocks that return text before image. References follow the image tokens."""
from .base import Family, Stack

QWEN_IMAGE = Family(
    name="qwen_image",
    models=("comfy.ldm.qwen_image.model:QwenImageTransformer2DModel",),
    stacks=(Stack(
        "transformer_blocks", inputs=("hidden_states", "encoder_hidden_states"), stream="hidden_states",
        returns=("encoder_hidden_states", "hidden_states"), joined=("encoder_hidden_states", "hidden_states")),),
    modulation=("transformer_blocks.*.img_mod", "transformer_blocks.*.txt_mod"),
)
