"""Memory for the cache, asked of the host before it loads weights.

    cache = rows x ranges of blocks x depth x bytes of one result
"""
import math
from collections.abc import Sequence
from functools import partial

from .memory import image_tokens
from .run import Run
from .stepcache.levels import Seam
from .store import ITEMSIZE


def cache_bytes(run: Run, network, itemsize: int, conditions: int, text: int = 0, references: Sequence[Sequence[int]] = ()) -> int:
    """What the run will keep on the GPU, told before it begins.

    itemsize: of the model's own type, in which its blocks work; text: tokens of the longest prompt; references: shapes
    of the reference latents whose tokens follow those of the image.
    """
    store, depth, elements = run.cache.store, run.cache.store.depth, None
    if run.level.seam is Seam.NETWORK:
        elements = token_elements(run.shape, network, text, references)
    per_row = math.prod(run.shape) * min(4, ITEMSIZE[store.storage])
    if elements is not None:
        per_row = elements * min(4 if getattr(run.level, "precise", False) else itemsize, ITEMSIZE[store.storage])
    if store.away:
        return depth * per_row + run.look_back_bytes        # what a prediction fetches back
    rows = 1 if run.level.seam is Seam.GUIDED else max(conditions, 1)
    total = rows * depth * per_row * getattr(run.level, "kept", 1)
    total = min(total, store.budget) if store.budget else total
    return total + run.look_back_bytes


def token_elements(shape: Sequence[int], network, text: int = 0, references: Sequence[Sequence[int]] = ()) -> int | None:
    """Tokens x channels of a diffusion model that tells its patch and its width, none of any other.

    Text, which some models join to the image and fill up to a multiple of 32, is counted for all.
    """
    patch = getattr(network, "patch_size", None)
    width = next((value for value in (getattr(network, name, None) for name in ("hidden_size", "dim", "inner_dim")) if isinstance(value, int)), None)
    if patch is None or width is None:
        return None
    tokens = sum(map(partial(image_tokens, patch=patch), (shape, *references)))
    return shape[0] * (tokens + math.ceil(text / 32) * 32) * width
