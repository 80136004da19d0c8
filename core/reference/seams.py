"""Where entries go into a model's attention. A seam takes the options of one model call and gives those with the entries in them."""
from collections.abc import Sequence

from .join import AttentionPatch, Buffers, Segment


def flux(options: dict, network, segments: Sequence[Segment], buffers: Buffers) -> dict:
    """FLUX.1, FLUX.2: behind the `attn1_patch`es that are there."""
    patches = options.get("patches", {})
    patch = AttentionPatch(segments, buffers, network.pe_embedder)
    return {**options, "patches": {**patches, "attn1_patch": [*patches.get("attn1_patch", ()), patch]}}


SEAMS = {"flux": flux}
