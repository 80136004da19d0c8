"""A text encoder without weights: every word is a fixed random vector, derived from its spelling."""
import zlib
from functools import cache

import torch
from torch import Tensor

WIDTH = 64
TOKENS = 8


@cache
def word_vector(word: str, width: int) -> Tensor:
    """[width], standard normal, the same on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(word.lower().encode("utf-8")))
    return torch.randn(width, generator=generator)


def encode(text: str, width: int = WIDTH, tokens: int = TOKENS, pooled_width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Tokens [1, tokens, width] and pooled [1, pooled_width] of the first `tokens` words.

    FLUX gives text tokens no position, so each token carries a code for its place. The empty text is all
    zeros, which is also what the models were trained on as "no caption".
    """
    words = [word for word in text.replace(",", " ").split() if word][:tokens]
    sequence = torch.zeros(1, tokens, width)
    pooled = torch.zeros(1, pooled_width)
    for place, word in enumerate(words):
        sequence[0, place] = (word_vector(word, width) + word_vector(f"pos:{place}", width)) * 0.7071
        pooled[0] += word_vector("pooled:" + word, pooled_width)
    if words:
        pooled /= len(words) ** 0.5
    return sequence, pooled
