"""What a Deferred may stand for. `compute` is the host's way to the value: its operations, and their bits.

    Product      y                      what a linear layer gave; known, and watched for what is done with it next
    Norm         norm(x) w
    Scaled       inner * row + shift    a norm's modulation, or a gate on a product or on a norm; shift may be missing
    Residual     x + scaled
    Silu         silu(a)
    Activation   gelu(a), or silu(a) b
    Joined       [attention, activation]
    Packed       q, k and v in one
    Once         k or v, on its way to being repeated once

x may be a Deferred residual that is not computed yet. Everything else is a plain tensor, weights too: `compute` may run inside a linear
layer, whose weight may lie where the host would put the next one that it is asked for.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .deferred import Deferred, plain


class Expression:
    """`like` tells shape, type and device where they are those of one input. awaited: a product could take it whole."""

    awaited = False

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device


@dataclass(eq=False)
class Product(Expression):
    like: Tensor

    def compute(self) -> Tensor:
        return self.like


class Packed(Product):
    pass


@dataclass(eq=False)
class Once(Product):
    unsqueezed: bool = False
    repeated: bool = False


@dataclass(eq=False)
class Norm(Expression):
    """weight: [C] on the device and in the type of x, None where there is none. A layer norm has none."""

    like: Tensor | Deferred
    rms: bool
    eps: float
    weight: Tensor | None = None

    def compute(self) -> Tensor:
        x = plain(self.like)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) if self.rms else F.layer_norm(x, x.shape[-1:], eps=self.eps)


@dataclass(eq=False)
class Scaled(Expression):
    like: Norm | Product
    row: Tensor                 # [B or 1, 1, C]
    shift: Tensor | None = None

    @property
    def awaited(self) -> bool:
        return isinstance(self.like, Norm)

    def compute(self) -> Tensor:
        inner = self.like.compute()
        return inner * self.row if self.shift is None else torch.addcmul(self.shift, inner, self.row)


@dataclass(eq=False)
class Residual(Expression):
    like: Tensor
    scaled: Scaled

    def compute(self) -> Tensor:
        """A sum of two has the same bits either way round, and this one needs no third tensor. x, which others may hold, is left alone."""
        return self.scaled.compute().add_(self.like)


@dataclass(eq=False)
class Silu(Expression):
    like: Tensor
    forward: Callable[[Tensor], Tensor]

    def compute(self) -> Tensor:
        return self.forward(self.like)


@dataclass(eq=False)
class Activation(Expression):
    like: Tensor                # a
    gate: Tensor | None         # b
    make: Callable[[], Tensor]
    awaited = True

    def compute(self) -> Tensor:
        return self.make()


@dataclass(eq=False)
class Joined(Expression):
    beside: Tensor
    like: Activation
    awaited = True

    @property
    def shape(self) -> torch.Size:
        *rows, channels = self.like.shape
        return torch.Size((*rows, self.beside.shape[-1] + channels))

    def compute(self) -> Tensor:
        return torch.cat((self.beside, self.like.compute()), -1)
