"""A seeded random Diffusion Template of one number, as its authors' files have it, for the tiny FLUX.2 that reads the fixture text encoder."""
import math
from pathlib import Path

import torch
from torch import Generator, Tensor

from .tiny import KINDS, save

TOKENS, WAVES = 16, 256     # of the template, and of the code of its number


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """fp32"""
    config, generator = KINDS["flux2_words"].config, Generator().manual_seed(seed)
    width = config["hidden"]
    blocks = [f"{kind}_{i}" for kind, count in (("double", config["depth"]), ("single", config["depth_single"])) for i in range(count)]

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = {}
    for name in (f"proj_{part}.{block}" for part in "kv" for block in blocks):
        made[f"{name}.prefer_value_embedder.0.weight"] = some(width, WAVES) / math.sqrt(WAVES)
        made[f"{name}.prefer_value_embedder.0.bias"] = some(width) * 0.02
        made[f"{name}.prefer_value_embedder.2.weight"] = some(width, width) / math.sqrt(width)
        made[f"{name}.prefer_value_embedder.2.bias"] = some(width) * 0.02
        made[f"{name}.positional_embedding"] = some(TOKENS, width)
    return made


def write(path: Path | str, seed: int = 0) -> None:
    """An fp16 file."""
    save(tensors(seed), path, {})
