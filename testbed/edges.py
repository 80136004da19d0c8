"""Edge maps: what the tiny EasyControl adapter is conditioned on, and how well a picture keeps to one.

    edges(x)        thin white lines on black, as Canny draws them, without its search for weak lines along strong ones
    agreement(a, b) the correlation of two edge maps, each spread over nine pixels: 1 is the same lines, 0 is chance
"""
import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
JUMP = 0.25     # the least gradient that is an edge; a step from black to white has 4 before it is blurred
SPREAD = 9


def edges(pictures: Tensor) -> Tensor:
    """pictures [B, 3, H, W] in [0, 1] to [B, 3, H, W] of 0 and 1."""
    ramp, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    bell = torch.exp(-torch.arange(-2.0, 3.0).square() / 2)
    bell = (bell[:, None] * bell / bell.sum() ** 2)[None, None]
    sobel = torch.stack([ramp[:, None] * slope, slope[:, None] * ramp])[:, None]
    grey = (pictures.float() * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    across, down = F.conv2d(padded(F.conv2d(padded(grey, 2), bell), 1), sobel).split(1, 1)
    jump = (across.square() + down.square()).sqrt()
    sides = F.max_pool2d(jump, (1, 3), 1, (0, 1)), F.max_pool2d(jump, (3, 1), 1, (1, 0))
    crest = jump >= torch.where(across.abs() > down.abs(), *sides)
    return (crest & (jump > JUMP)).float().expand(-1, 3, -1, -1)


def padded(x: Tensor, by: int) -> Tensor:
    return F.pad(x, (by, by, by, by), mode="replicate")


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """Edge maps [B, 3, H, W] each to [B]."""
    flat = []
    for lines in (a, b):
        soft = F.avg_pool2d(lines[:, :1].float(), SPREAD, stride=1, padding=SPREAD // 2, count_include_pad=False).flatten(1)
        flat.append(soft - soft.mean(1, keepdim=True))
    return F.cosine_similarity(*flat, dim=1)
