"""For the kernels between two products: x + gate y, its next norm, straight to int8 codes. What differs between families is the kernel itself."""
import torch
from torch import Tensor

from . import _rows


def checked(x: Tensor, y: Tensor, rows: dict[str, Tensor], rotation: bool) -> None:
    """ValueError unless x and y, [B, N, C], are alike and each of `rows` is [B or 1, 1, C]."""
    if y.shape != x.shape or y.dtype is not x.dtype:
        raise ValueError(f"x {tuple(x.shape)} in {x.dtype} came with y {tuple(y.shape)} in {y.dtype}; pass two of one shape and type")
    _rows.checked(x, rows, rotation)


def results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the residual, [B, N, C] in the type of x, its codes and their scales."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *_rows.codes_like(x, x.shape[-1])


def launched(kernel, x: Tensor, y: Tensor, *parts: Tensor, rotation: bool, eps: float, one_plus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `kernel` makes of x and y. parts: what it takes between these and its results, rows [B or 1, 1, C] and weights [C]."""
    residual, codes, scales = results(x)
    batch, tokens, channels = x.shape
    strides = (*x.stride()[:2], *y.stride()[:2], *(_rows.batch_stride(part) for part in parts if part.ndim == 3))
    with torch.cuda.device_of(x):
        kernel[(tokens, batch)](
            x, y, *parts, residual, codes, scales, channels, *strides, eps,
            ONE_PLUS=int(one_plus), ROTATION=rotation, **_rows.pieces(channels, x.element_size()))
    return residual, codes, scales
