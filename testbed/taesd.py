"""The 16-channel Tiny AutoEncoder (TAESD, Ollin Boer Bohan, MIT) under the host's parameter names, for training."""
import torch
from torch import Tensor, nn

from .nodes.patch_vae import SCALE, SHIFT

WIDTH = 64


def conv(n_in: int, n_out: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def encoder(channels: int) -> nn.Sequential:
    def down() -> list[nn.Module]:
        return [conv(WIDTH, WIDTH, stride=2, bias=False), Block(), Block(), Block()]
    return nn.Sequential(conv(3, WIDTH), Block(), *down(), *down(), *down(), conv(WIDTH, channels))


def decoder(channels: int) -> nn.Sequential:
    def up() -> list[nn.Module]:
        return [Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(Clamp(), conv(channels, WIDTH), nn.ReLU(), *up(), *up(), *up(), Block(), conv(WIDTH, 3))


class TAESD(nn.Module):
    """Encoder: pixels [B, 3, H, W] in [0, 1] to z [B, 16, H/8, W/8]; decoder: the way back."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.taesd_encoder, self.taesd_decoder = encoder(channels), decoder(channels)
        self.vae_scale = nn.Parameter(torch.tensor(SCALE), requires_grad=False)
        self.vae_shift = nn.Parameter(torch.tensor(SHIFT), requires_grad=False)


def init_(net: TAESD) -> TAESD:
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim >= 2:
                nn.init.kaiming_normal_(p, nonlinearity="relu")
            elif not name.startswith("vae_"):
                p.zero_()
        for module in net.modules():
            if isinstance(module, Block):
                module.conv[4].weight.mul_(0.2)  # residual branches begin small
    return net.to(memory_format=torch.channels_last)
