"""What the tests of Deferred share: an expression of every kind, from random rows."""
import torch
from torch.nn import functional as F

from pack.core.quant.fusion.expressions import Activation, Joined, Norm, Once, Packed, Product, Residual, Scaled, Silu
from pack.core.quant.fusion.scope import Int8, Record, Scope

B, N, C = 2, 5, 16


def scope(**more) -> Scope:
    return Scope(Record(), lambda weight: weight if isinstance(weight, Int8) else "in float32", **more)


def rows(seed: int, dtype=torch.float32, *shape: int):
    return torch.randn(shape or (B, N, C), generator=torch.Generator().manual_seed(seed)).to(dtype)


def row(seed: int, dtype=torch.float32):
    return rows(seed, dtype, B, 1, C)


def norm(x, rms=False) -> Norm:
    return Norm(x, rms, 1e-5 if rms else 1e-6)


def activation(x) -> Activation:
    return Activation(x, None, lambda: F.gelu(x, approximate="tanh"))


# an expression of every kind from a tensor, and what the host would have in its place
KINDS = {
    "product": (lambda x: Product(x), lambda x: x),
    "packed": (lambda x: Packed(x), lambda x: x),
    "once": (lambda x: Once(x), lambda x: x),
    "norm": (lambda x: norm(x), lambda x: F.layer_norm(x, (C,), eps=1e-6)),
    "modulated": (lambda x: Scaled(norm(x), row(1, x.dtype), row(2, x.dtype)),
                  lambda x: torch.addcmul(row(2, x.dtype), F.layer_norm(x, (C,), eps=1e-6), row(1, x.dtype))),
    "gated": (lambda x: Scaled(Product(x), row(1, x.dtype)), lambda x: row(1, x.dtype) * x),
    "residual": (lambda x: Residual(rows(3, x.dtype), Scaled(Product(x), row(1, x.dtype))), lambda x: rows(3, x.dtype) + row(1, x.dtype) * x),
    "silu": (lambda x: Silu(x, F.silu), F.silu),
    "gelu": (activation, lambda x: F.gelu(x, approximate="tanh")),
    "joined": (lambda x: Joined(rows(4, x.dtype, B, N, 3), activation(x)), lambda x: torch.cat((rows(4, x.dtype, B, N, 3), F.gelu(x, approximate="tanh")), 2)),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
