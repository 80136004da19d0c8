"""Wan 2.1 and 2.2 with Camera, VACE, S2V, HuMo, Animate, SCAIL and WanDancer: one stack over the video tokens.

References, poses and motion frames are joined to the video tokens before the first block and cut off after the last.
Between the blocks VACE runs blocks of its own and adds what they return, S2V and WanDancer let audio attend into the
tokens, Animate adds what its face adapter returns. HuMo's audio is inside the blocks.
The autoregressive model is left out: its blocks write keys and values.
"""
from .base import Family, Side, Stack

MODEL = "comfy.ldm.wan.model:"

WAN = Family(
    name="wan",
    models=(
        f"{MODEL}WanModel", f"{MODEL}VaceWanModel", f"{MODEL}CameraWanModel", f"{MODEL}WanModel_S2V", f"{MODEL}HumoWanModel",
        f"{MODEL}SCAILWanModel", f"{MODEL}SCAIL2WanModel", "comfy.ldm.wan.model_animate:AnimateWanModel",
        "comfy.ldm.wan.model_wandancer:WanDancerModel",
    ),
    stacks=(Stack("blocks", inputs=("x", "e"), stream="x", returns=("x",), joined=("x",)),),
    sides=(
        Side("vace_blocks", inputs=("c",), returns=(None, "c"), blocks=True, chained=True),
        Side("audio_injector", inputs=("x",), returns=("x",)),
        Side("music_injector", inputs=("x",), returns=("x",)),
        Side("face_adapter.fuser_blocks", inputs=("x",), returns=(None,)),
    ),
    warm_up=2,      # the first steps lay out the motion, of each of Wan 2.2's experts too: TeaCache and MagCache keep them
    modulated=lambda block, argument: argument("e"),    # TeaCache takes the projected time embedding here
    modulation=("time_projection",),
)
