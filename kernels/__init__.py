"""One file per kernel. Knows torch and Triton, and nothing of the rest of the pack. A new kernel is a file here and a line below."""
from .combine import COMBINE, COMBINE_ERROR

KERNELS = (
    COMBINE,
    COMBINE_ERROR,
)

__all__ = ["KERNELS"]
