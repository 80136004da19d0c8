"""A text encoder that the stock nodes take for the host's own."""
from torch import Tensor

from .text import WIDTH, encode


class HashCLIP:
    """Duck-typed host CLIP: the stock CLIPTextEncode node runs on it."""

    def __init__(self, width: int = WIDTH):
        self.width = width

    def tokenize(self, text: str, **_) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_) -> list[tuple[Tensor, dict]]:
        sequence, pooled = encode(tokens, width=self.width, pooled_width=self.width)
        return [(sequence, {"pooled_output": pooled})]
