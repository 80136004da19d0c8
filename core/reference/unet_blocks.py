"""The self-attention layers of the host's UNet: their names in an entry, and how many tokens a latent has in each.

A name is "input.1.0": a side of the UNet, the number of its block, and the transformer block in that. The host's key for
the same layer in patches_replace["attn1"] is ("input", 1, 0).
"""
from collections.abc import Iterator

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample
from torch import nn

Place = tuple[str, int, int]


def name_of(place: Place) -> str:
    return ".".join(map(str, place))


def place_of(name: str) -> Place:
    kind, number, index = name.split(".")
    return kind, int(number), int(index)


def attention_blocks(network, height: int, width: int) -> Iterator[tuple[Place, nn.Module, int]]:
    """Place, transformer block and number of tokens, in the order in which the network runs them on a latent of this size.

    A downsampling convolution of stride 2 rounds up, and an output block works at the size of the input block that it is joined with.
    """
    sizes: list[tuple[int, int]] = []
    for layers in network.input_blocks:
        for layer in layers:
            if isinstance(layer, Downsample):
                height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    sides = [
        *((("input", i), layers, sizes[i]) for i, layers in enumerate(network.input_blocks)),
        (("middle", 0), network.middle_block, sizes[-1]),
        *((("output", i), layers, sizes[-1 - i]) for i, layers in enumerate(network.output_blocks)),
    ]
    for place, layers, (high, wide) in sides:
        for layer in layers:
            if isinstance(layer, SpatialTransformer):
                for index, block in enumerate(layer.transformer_blocks):
                    yield (*place, index), block, high * wide


def halvings(network) -> int:
    """How often a UNet halves what comes into it."""
    return sum(isinstance(layer, Downsample) for layers in network.input_blocks for layer in layers)


def level_tokens(height: int, width: int) -> tuple[int, ...]:
    """Tokens of a latent at every resolution that a UNet of any depth may have."""
    counts = [height * width]
    while counts[-1] > 1:
        height, width = -(-height // 2), -(-width // 2)
        counts.append(height * width)
    return tuple(counts)


def entry_bytes(network, height: int, width: int, dtype: torch.dtype) -> int:
    """K and V of one row: 2 sum_l T_l C_l elements."""
    elements = sum(tokens * block.n_heads * block.d_head for _, block, tokens in attention_blocks(network, height, width))
    return 2 * elements * torch.empty(0, dtype=dtype).element_size()
