"""What a latent comes to in tokens, and how to have the host free more memory for a run than it would.

It frees by an estimate that grows with the area of the noise. A shape with more columns makes it free more; the noise itself
stays as it is.
"""
import math
from collections.abc import Callable, Sequence


def enlarged(shape: Sequence[int], extra: int, memory_required: Callable[[Sequence[int]], float], limits: dict[int, int]) -> list[int]:
    """`shape` with as many more columns as make `memory_required` grow by `extra` bytes.

    `limits` tells dimensions that the host cuts off, {dimension: size}, as context windows do; another one is made larger.
    """
    dim = next(d for d in (*reversed(range(2, len(shape))), 0) if d not in limits)      # 1 is channels, which are no area
    seen = [min(size, limits.get(d, size)) for d, size in enumerate(shape)]
    more = [size + (d == dim) for d, size in enumerate(seen)]
    column = memory_required(more) - memory_required(seen)
    columns = math.ceil(extra / column) if column > 0 else 0
    return [size + columns * (d == dim) for d, size in enumerate(shape)]


def image_tokens(shape: Sequence[int], patch: int | Sequence[int]) -> int:
    sizes = shape[2:]
    patches = [patch] * 2 if isinstance(patch, int) else list(patch)
    patches = [1] * (len(sizes) - len(patches)) + patches[-len(sizes):]
    return math.prod(math.ceil(size / p) for size, p in zip(sizes, patches, strict=True))
