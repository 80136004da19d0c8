"""Where entries go into a model's attention. A seam takes the options of one model call and gives those with the entries in them.

A layout tells the blocks that a seam reaches in a network: {name: (heads, width of a head)}; none in a network of another kind.
"""
from collections.abc import Sequence

from .join import AttentionPatch, Buffers, Segment
from .unet_attention import JoinedAttention
from .unet_blocks import attention_blocks, name_of, place_of

Layout = dict[str, tuple[int, int]]


def flux(options: dict, network, segments: Sequence[Segment], buffers: Buffers) -> dict:
    """FLUX.1, FLUX.2: behind the `attn1_patch`es that are there."""
    patches = options.get("patches", {})
    patch = buffers.patch(segments, lambda: AttentionPatch(segments, buffers, network.pe_embedder))
    return {**options, "patches": {**patches, "attn1_patch": [*patches.get("attn1_patch", ()), patch]}}


def unet(options: dict, network, segments: Sequence[Segment], buffers: Buffers) -> dict:
    """The host's UNet: in place of self-attention, around a replacement that is there for the same block."""
    replaced = options.get("patches_replace", {})
    there = replaced.get("attn1", {})
    entries = dict(there)
    for name in segments[0].entry.blocks:
        place = place_of(name)
        entries[place] = JoinedAttention(name, segments, buffers, there.get(place, there.get(place[:2])))
    return {**options, "patches_replace": {**replaced, "attn1": entries}}


def flux_layout(network) -> Layout:
    """Double- and single-stream blocks, which are all alike."""
    names = [f"{kind}.{i}" for kind in ("double", "single") for i in range(len(getattr(network, f"{kind}_blocks", ())))]
    return {name: (network.num_heads, network.hidden_size // network.num_heads) for name in names}


def unet_layout(network) -> Layout:
    """Self-attention of a UNet that has a way in for references."""
    if not hasattr(network, "condition_conv_in"):
        return {}
    return {name_of(place): (block.n_heads, block.d_head) for place, block, _ in attention_blocks(network, 1, 1)}


SEAMS = {"flux": flux, "unet": unet}
LAYOUTS = {"flux": flux_layout, "unet": unet_layout}
