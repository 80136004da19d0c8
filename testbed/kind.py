"""What a tiny model of testbed/tiny.py is built from and fed with."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class Kind:
    """How a model is built, and what it wants to be fed.

    build: makes the network from `config`; without it the host's model class `host` does.
    channels, frames: latents are [B, C, H, W], or [B, C, T, H, W] where there are frames.
    text, pooled: width of the text embedding and of its pooled one.
    metadata: of its checkpoint, from `config`.
    extra: further entries of a prompt, random ones from the generator.
    finish: changes the network that the host has built.
    noise: makes a latent of the given shape that is no plain tensor.
    """

    build: Callable[..., nn.Module] | None = None
    config: dict = field(default_factory=dict)
    channels: int = 16
    text: int = 16
    pooled: int = 0
    frames: int = 0
    metadata: Callable[[dict], dict] = lambda config: {}
    host: str = ""
    extra: Callable[[Generator], dict] = lambda generator: {}
    finish: Callable[[nn.Module], None] = lambda network: None
    noise: Callable[..., Tensor] = lambda size, generator: torch.randn(size, generator=generator)

    @property
    def stock(self) -> bool:
        """Whether the stock loader can tell its size."""
        return not self.host

    def latent(self, size: int | tuple[int, int] = 8, batch: int = 1) -> tuple[int, ...]:
        height, width = (size, size) if isinstance(size, int) else size
        return (batch, self.channels, *((self.frames,) if self.frames else ()), height, width)
