"""How far a tensor is from another, over a sample of both:  drift = mean|a - b| / mean|b|."""
from torch import Tensor

SAMPLE = 1 << 18    # elements looked at, more than enough for a mean
FLOOR = 1e-12       # what the mean of |b| is held above


def stride(elements: int, most: int | None = None) -> int:
    """Every how many elements one is looked at. Odd, so that the sample walks through all channels."""
    return (elements // (most or SAMPLE)) | 1


def sampled(value: Tensor, most: int | None = None) -> Tensor:
    """A view, strided where it is long, of at most about twice `most` (SAMPLE) elements."""
    flat = value.reshape(-1)
    step = stride(flat.numel(), most)
    return flat if step == 1 else flat[::step]


def size(actual: Tensor) -> Tensor:
    """mean|b|, what drifts from b are relative to. 0-d, fp32, still on the device."""
    return actual.float().abs().mean().clamp_min(FLOOR)


def relative_error(predicted: Tensor, actual: Tensor, known: Tensor | None = None) -> Tensor:
    """0-d, fp32, still on the device. `known` is the size of `actual`, for whoever compares several things with it."""
    off = (predicted.float() - actual.float()).abs_()
    return off.mean() / (size(actual) if known is None else known)
