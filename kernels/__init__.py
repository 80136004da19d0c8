"""One file per kernel. Knows torch and Triton, and nothing of the rest of the pack. A new kernel is a file here and a line below."""
from .combine import COMBINE, COMBINE_ERROR
from .quantize import QUANTIZE_ROWS

KERNELS = (
    COMBINE,
    COMBINE_ERROR,
    QUANTIZE_ROWS,
)

__all__ = ["KERNELS"]
