"""A tensor that is made when it is read: what a layer would be saved as, without making it each time the host asks how large the layer is."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Later(Tensor):
    """Shape and dtype are known, `made` gives the tensor. nbytes: what is held now, as the host adds these up for the size of a model.

    It says it is on no device, so that safetensors and torch ask for it with `.to("cpu")`. Any operation on it makes it.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int, made: Callable[[], Tensor]):
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="meta", requires_grad=False)

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int, made: Callable[[], Tensor]):
        self.held, self.made = nbytes, made

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Later(shape={tuple(self.shape)}, dtype={self.dtype}, held={self.held})"

    @property
    def nbytes(self) -> int:
        return self.held

    def detach(self) -> Later:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Later:     # torch.nn.Parameter asks it of every tensor
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda value: value.made() if isinstance(value, Later) else value, (args, kwargs or {}))
        return func(*args, **kwargs)


def later(shape: tuple[int, int], nbytes: int, scale_nbytes: int, made: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Endings and tensors of a layer of the host's int8 with a scale for each row. made: gives both. nbytes: what the layer holds now."""
    return {"": Later(shape, torch.int8, nbytes, lambda: made()[0]), "_scale": Later((shape[0], 1), torch.float32, scale_nbytes, lambda: made()[1])}
