"""FLUX.1, Kontext, FLUX.2, LongCat: double-stream blocks, then single-stream blocks over text ++ image.

The blocks write into their inputs. ControlNet is added in place after each block. Reference tokens follow the
image tokens, and only the image tokens of the last block reach the output.
"""
from torch import Tensor

from .base import Family, Stack

DOUBLE = Stack("double_blocks", inputs=("img", "txt", "vec"), stream="img", returns=("img", "txt"), joined=("txt", "img"))
SINGLE = Stack("single_blocks", inputs=("x",), stream="x", returns=("x",), joined=("x",))


def modulated(block, argument) -> Tensor:
    """LN(img) (1 + scale) + shift. With a modulation that all blocks share, vec brings it along, that of the image first."""
    vec = argument("vec")
    first = block.img_mod(vec)[0] if block.modulation else vec[0][0]
    # with clean references there are two modulations; the first is that of the noisy tokens
    return block.img_norm1(argument("img")) * (1 + first.scale[:, :1]) + first.shift[:, :1]


MODULATION = ("double_blocks.*.img_mod", "double_blocks.*.txt_mod", "single_blocks.*.modulation", "final_layer.adaLN_modulation")
SHARED = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")      # by all blocks of FLUX.2

FLUX = Family(
    name="flux", models=("comfy.ldm.flux.model:Flux",), stacks=(DOUBLE, SINGLE), modulated=modulated, modulation=(*MODULATION, *SHARED))
