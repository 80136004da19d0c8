"""HiDream-I1: double-stream blocks, then single-stream blocks over image ++ text.

Before every block the host joins another layer of the Llama text encoder at the end, and cuts it off after the block.
"""
from .base import Family, Stack

INPUTS = ("image_tokens", "image_tokens_masks", "text_tokens", "adaln_input")

HIDREAM_I1 = Family(
    name="hidream_i1",
    models=("comfy.ldm.hidream.model:HiDreamImageTransformer2DModel",),
    stacks=(
        Stack("double_stream_blocks", inputs=INPUTS, stream="image_tokens", returns=("image_tokens", "text_tokens"),
              joined=("image_tokens", "text_tokens")),
        Stack("single_stream_blocks", inputs=INPUTS, stream="image_tokens", returns=("image_tokens",), joined=("image_tokens",), image_first=True),
    ),
    # TeaCache takes the time embedding, which no block sees; this is that plus the pooled text, constant over a run
    modulated=lambda block, argument: argument("adaln_input"),
    modulation=("double_stream_blocks.*.block.adaLN_modulation", "single_stream_blocks.*.block.adaLN_modulation", "final_layer.adaLN_modulation"),
)
