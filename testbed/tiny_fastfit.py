"""A seeded random FastFit UNet as its authors' files have it: diffusers' keys, no cross-attention, a second convolution and an embedding of classes."""
import math
from pathlib import Path

import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Generator, Tensor

from .tiny import SD15_LIKE, fill_, save

CLASSES = 5
CONFIG = {**SD15_LIKE, "in_channels": 9}


@torch.no_grad()
def tensors(seed: int = 0) -> dict[str, Tensor]:
    """fp32"""
    net = fill_(UNetModel(**CONFIG, device="cpu", operations=comfy.ops.disable_weight_init), seed)
    own, width = net.state_dict(), CONFIG["model_channels"]
    found = {theirs: own[ours].clone() for theirs, ours in comfy.utils.unet_to_diffusers(CONFIG).items()
             if ours in own and ".attn2." not in theirs and ".transformer_blocks.0.norm2." not in theirs}
    generator = Generator().manual_seed(seed)
    found["condition_conv_in.weight"] = torch.randn(width, 4, 3, 3, generator=generator) / math.sqrt(4 * 9)
    found["condition_conv_in.bias"] = torch.randn(width, generator=generator) * 0.02
    found["class_embedding.weight"] = torch.randn(CLASSES, 4 * width, generator=generator)
    return found


def write(path: Path | str, seed: int = 0) -> None:
    """An fp16 checkpoint."""
    save(tensors(seed), path, {})
