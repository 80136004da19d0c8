"""LTX-2: the blocks carry a pair of streams, video and audio, and write into both. The audio keeps a residual of its own."""
from .base import Family, Stack

LTXAV = Family(
    name="ltxav",
    models=("comfy.ldm.lightricks.av_model:LTXAVModel",),
    stacks=(Stack(
        "transformer_blocks", inputs=("x",), packed=("video", "audio"), stream="video", also=("audio",), returns=("video", "audio"),
        joined=("video",)),),
)
