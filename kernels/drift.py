"""How far a tensor is from another, over a sample of both:  drift = mean|a - b| / mean|b|."""
from torch import Tensor

SAMPLE = 1 << 18    # elements looked at, more than enough for a mean
FLOOR = 1e-12       # what the mean of |b| is held above


def stride(elements: int, most: int | None = None) -> int:
    """Every how many elements one is looked at. Odd, so that the sample walks through all channels."""
    return (elements // (most or SAMPLE)) | 1


def sampled(value: Tensor, most: int | None = None) -> Tensor:
    """A strided view of at most about twice `most` (SAMPLE) elements."""
    flat = value.reshape(-1)
    return flat[:: stride(flat.numel(), most)]


def relative_error(predicted: Tensor, actual: Tensor) -> Tensor:
    """0-d, fp32, still on the device."""
    return (predicted.float() - actual.float()).abs().mean() / actual.float().abs().mean().clamp_min(FLOOR)
