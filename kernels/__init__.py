"""One file per kernel. Knows torch and Triton, and nothing of the rest of the pack. A new kernel is a file here and a line below."""
from .activate import ACTIVATE_INT8
from .combine import COMBINE, COMBINE_ERROR
from .gated_residual import GATED_RESIDUAL_INT8
from .gguf_weights import GGUF_CODES, GGUF_ROW_SCALES, GGUF_VALUES
from .int8_linear import INT8_LINEAR
from .modulate import MODULATE, MODULATE_INT8
from .qkv_rope import QKV_ROPE
from .quantize import QUANTIZE_ROWS
from .sandwich_residual import SANDWICH_RESIDUAL_INT8

KERNELS = (
    COMBINE,
    COMBINE_ERROR,
    GGUF_CODES,
    GGUF_ROW_SCALES,
    GGUF_VALUES,
    QUANTIZE_ROWS,
    MODULATE,
    MODULATE_INT8,
    GATED_RESIDUAL_INT8,
    SANDWICH_RESIDUAL_INT8,
    ACTIVATE_INT8,
    QKV_ROPE,
    INT8_LINEAR,
)

__all__ = ["KERNELS"]
