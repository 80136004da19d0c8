"""One file per kernel. Knows torch and Triton, and nothing of the rest of the pack. A new kernel is a file here and a line below."""
from .combine import COMBINE, COMBINE_ERROR
from .gguf_weights import GGUF_CODES, GGUF_ROW_SCALES, GGUF_VALUES
from .int8_linear import INT8_LINEAR
from .quantize import QUANTIZE_ROWS

KERNELS = (
    COMBINE,
    COMBINE_ERROR,
    GGUF_CODES,
    GGUF_ROW_SCALES,
    GGUF_VALUES,
    QUANTIZE_ROWS,
    INT8_LINEAR,
)

__all__ = ["KERNELS"]
