"""Stable Diffusion 3 and 3.5: joint blocks; the last one returns no text. ControlNet is added in place after each block."""
from .base import Family, Stack

SD3 = Family(
    name="sd3",
    models=("comfy.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper",),
    stacks=(Stack("joint_blocks", inputs=("context", "x"), stream="x", returns=("context", "x"), joined=("context", "x")),),
    wrapped=False,
    modulation=("joint_blocks.*.context_block.adaLN_modulation", "joint_blocks.*.x_block.adaLN_modulation", "final_layer.adaLN_modulation"),
)
