"""Cosmos-Predict2 and Anima: one stack over [B, T, H, W, C], in fp32 also where the model is fp16."""
from torch import Tensor

from .base import Family, Stack


def modulated(block, argument) -> Tensor:
    """LN(x) (1 + scale) + shift, the modulation [B, T, C] being the block's of the time embedding, with a share of all blocks added."""
    x, modulation = argument("x_B_T_H_W_D"), block.adaln_modulation_self_attn(argument("emb_B_T_D"))
    if block.use_adaln_lora:
        modulation = modulation + argument("adaln_lora_B_T_3D")
    shift, scale, _ = modulation[:, :, None, None].chunk(3, -1)
    return block.layer_norm_self_attn(x) * (1 + scale) + shift


COSMOS_PREDICT2 = Family(
    name="cosmos_predict2",
    models=("comfy.ldm.cosmos.predict2:MiniTrainDIT", "comfy.ldm.anima.model:Anima"),
    stacks=(Stack(
        "blocks", inputs=("x_B_T_H_W_D", "emb_B_T_D", "crossattn_emb"), stream="x_B_T_H_W_D", returns=("x_B_T_H_W_D",), joined=("x_B_T_H_W_D",)),),
    modulated=modulated,
)
