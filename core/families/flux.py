"""FLUX.1, Kontext, FLUX.2: double-stream blocks, then single-stream blocks over text ++ image.

The blocks write into their inputs. ControlNet is added in place after each block. Reference tokens follow the
image tokens, and only the image tokens of the last block reach the output.
"""
from .base import Family, Stack

FLUX = Family(
    name="flux",
    model="comfy.ldm.flux.model:Flux",
    stacks=(
        Stack("double_blocks", inputs=("img", "txt"), stream="img", returns=("img", "txt")),
        Stack("single_blocks", inputs=("x",), stream="x", returns=("x",)),
    ),
)
