"""FastFit's UNet as the host runs it: SD 1.5 for inpainting without cross-attention, and with a second way in for references.

    main pass        h = conv_in([x_t; mask; masked person]),  emb = time_embed(t)
    reference pass   h = condition_conv_in(x_ref),             emb = class_embedding(class)

The host's UNetModel does both. Cross-attention, which the checkpoint does not have, gives zeros: a block adds them, exactly.
From Chong et al., "FastFit: Accelerating Multi-Reference Virtual Try-On via Cacheable Diffusion Models", arXiv 2508.20586.
"""
import comfy.model_base
import comfy.supported_models
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

LATENT_CHANNELS = 4
IN_CHANNELS = 2 * LATENT_CHANNELS + 1      # noise, mask, masked person


class NoCrossAttention(nn.Module):
    """In the place of `attn2`: what it would add to the stream is zero."""

    def forward(self, x: Tensor, context=None, value=None, mask=None, transformer_options=None) -> Tensor:
        return torch.zeros_like(x)


class FastFitUNet(UNetModel):
    """num_class_embeds: kinds of garments that the checkpoint knows; all else as the host's class has it."""

    def __init__(self, *args, num_class_embeds: int, model_channels: int, dtype=torch.float32, device=None, operations=None, **kwargs):
        super().__init__(*args, model_channels=model_channels, dtype=dtype, device=device, operations=operations, **kwargs)
        for block in (module for module in self.modules() if isinstance(module, BasicTransformerBlock)):
            block.attn2, block.norm2 = NoCrossAttention(), nn.Identity()
        self.condition_conv_in = operations.Conv2d(LATENT_CHANNELS, model_channels, 3, padding=1, dtype=dtype, device=device)
        self.class_embedding = operations.Embedding(num_class_embeds, 4 * model_channels, dtype=dtype, device=device)

    def as_reference(self, label: int) -> dict:
        """`patches` that make a call of this network a reference pass."""
        def garment(emb: Tensor, channels: int, options: dict) -> Tensor:
            return self.class_embedding(torch.tensor([label], device=emb.device), out_dtype=emb.dtype).to(emb).expand_as(emb)

        def way_in(layer: nn.Module, x: Tensor, *others) -> Tensor:
            return self.condition_conv_in(x)

        # Of the layers that a UNet's blocks are lists of, the first one alone is a bare convolution.
        return {"emb_patch": [garment], "forward_timestep_embed_patch": [(nn.Conv2d, way_in)]}


class FastFitConfig(comfy.supported_models.SD15):
    """The host's facts about SD 1.5, in its inpainting form and with this UNet."""

    def get_model(self, state_dict, prefix="", device=None):
        model = comfy.model_base.BaseModel(self, model_type=self.model_type(state_dict, prefix), device=device, unet_model=FastFitUNet)
        model.set_inpaint()
        return model
