"""Where entries go into a model's attention. A seam takes the options of one model call and gives those with the entries in them."""
from collections.abc import Sequence

from .join import AttentionPatch, Buffers, Segment
from .unet_attention import JoinedAttention
from .unet_blocks import place_of


def flux(options: dict, network, segments: Sequence[Segment], buffers: Buffers) -> dict:
    """FLUX.1, FLUX.2: behind the `attn1_patch`es that are there."""
    patches = options.get("patches", {})
    patch = AttentionPatch(segments, buffers, network.pe_embedder)
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


SEAMS = {"flux": flux, "unet": unet}
