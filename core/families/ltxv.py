"""LTX-Video: one stack over the video tokens, keyframes among them. The blocks write into their input."""
from torch import Tensor
from torch.nn.functional import rms_norm

from .base import Family, Stack


def modulated(block, argument) -> Tensor:
    """RMS(x) (1 + scale) + shift, the modulation being the block's table plus the time embedding [B, 1 or N, 6 C or 9 C]."""
    x, time, table = argument("x"), argument("timestep"), block.scale_shift_table
    both = table.to(x)[None, None, :2] + time.reshape(x.shape[0], time.shape[1], table.shape[0], -1)[:, :, :2]
    shift, scale = both.unbind(2)
    return rms_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift


LTXV = Family(
    name="ltxv",
    models=("comfy.ldm.lightricks.model:LTXVModel",),
    stacks=(Stack(
        "transformer_blocks", inputs=("x", "context", "attention_mask", "timestep"), stream="x", returns=("x",), joined=("x",)),),
    modulated=modulated,
)
