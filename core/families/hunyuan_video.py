"""HunyuanVideo, 1.5 and HunyuanImage 2.1: FLUX's blocks; ControlNet is added in place after each of them.

A reference frame is joined before the video tokens, and byT5 and vision tokens before or after the text.
"""
from torch import Tensor

from .base import Family
from .flux import DOUBLE, MODULATION, SINGLE


def modulated(block, argument) -> Tensor:
    """LN(img) (1 + scale) + shift; with a guiding frame there are two modulations, and the second is that of the noisy frames."""
    first = block.img_mod(argument("vec"))[0]
    return block.img_norm1(argument("img")) * (1 + first.scale[:, -1:]) + first.shift[:, -1:]


HUNYUAN_VIDEO = Family(
    name="hunyuan_video", models=("comfy.ldm.hunyuan_video.model:HunyuanVideo",), stacks=(DOUBLE, SINGLE), modulated=modulated,
    modulation=MODULATION)
