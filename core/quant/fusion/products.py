"""A linear layer on an expression: straight to int8 codes and the int8 product where the weight is int8, one pass over the tokens where it is not.

    norm, modulation                            modulate_int8
    residual, norm, modulation                  gated_residual_int8         FLUX
    norm, residual, norm, modulation            sandwich_residual_int8      Z-Image
    gelu or silu * gate [beside attention]      activate_int8
    norm, modulation, before any other weight   modulate

The host's layer has cast the weight by then, patched it and brought it to the GPU; nothing of that is done again here.
"""
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ....kernels.activate import activate_int8
from ....kernels.gated_residual import gated_residual_int8
from ....kernels.int8_linear import int8_linear
from ....kernels.modulate import modulate, modulate_int8
from ....kernels.sandwich_residual import sandwich_residual_int8
from .deferred import Deferred, pending, plain
from .expressions import Activation, Joined, Norm, Product, Residual, Scaled
from .scope import Int8


def product(deferred: Deferred, weight, bias) -> Tensor | None:
    """The layer's output, or None where the layer is to see the plain value."""
    scope, expression = deferred.scope, deferred.expression
    if not expression.awaited:
        return None
    found = scope.int8(weight)
    if not isinstance(found, Int8):
        return unquantized(deferred, weight, bias, found)
    if by_kitchen := scope.kitchen and whole_in_kitchen(expression, found, bias):
        scope.record.fuse("gelu+int8 by comfy_kitchen")
        return by_kitchen()
    if not scope.kernels:
        return None
    coded = deferred.codes.get(found.rotation) or produced(scope, expression, found.rotation)
    if coded is None:
        return None
    deferred.codes[found.rotation] = coded
    return int8_linear(*coded, found.codes, found.scales, bias, out_dtype=expression.dtype)


def whole_in_kitchen(expression, weight: Int8, bias):
    """comfy_kitchen's int8 product with GELU inside, as something to call; None where it has none for this."""
    if not isinstance(expression, Activation) or expression.gate is not None or not weight.rotation:
        return None
    import comfy_kitchen

    return lambda: comfy_kitchen.int8_linear(
        expression.like.reshape(-1, expression.shape[-1]), weight.codes, weight.scales, bias, out_dtype=expression.dtype, convrot=True,
        input_act="gelu_tanh").reshape(*expression.shape[:-1], -1)


def unquantized(deferred: Deferred, weight, bias, why: str) -> Tensor | None:
    expression = deferred.expression
    deferred.scope.record.leave(why)
    norm = expression.like if isinstance(expression, Scaled) else None
    if not isinstance(norm, Norm) or not deferred.scope.every or not deferred.scope.kernels:
        return None
    y = modulate(plain(norm.like), expression.row, expression.shift, norm.weight, rms=norm.rms, eps=norm.eps, one_plus=False)
    deferred.settle(y)
    deferred.scope.record.fuse("norm+modulate")
    return F.linear(y, weight, bias)


def produced(scope, expression, rotation: bool) -> tuple[Tensor, Tensor] | None:
    """Codes [B, N, C] and scales [B, N, 1]."""
    match expression:
        case Activation():
            scope.record.fuse("swiglu+int8" if expression.gate is not None else "gelu+int8")
            return activate_int8(expression.like, expression.gate, rotation=rotation)
        case Joined():
            activation = expression.like
            scope.record.fuse("swiglu+cat+int8" if activation.gate is not None else "gelu+cat+int8")
            return activate_int8(activation.like, activation.gate, expression.beside, rotation=rotation)
        case Scaled(like=Norm()):
            return modulated(scope, expression, rotation)
    return None


def modulated(scope, scaled: Scaled, rotation: bool) -> tuple[Tensor, Tensor]:
    norm = scaled.like
    residual = pending(norm.like, Residual)
    term = residual.scaled if residual is not None else None
    if term is not None and not norm.rms and scaled.shift is not None and type(term.like) is Product:
        r, *coded = gated_residual_int8(
            residual.like, term.like.like, term.row, scaled.row, scaled.shift, rotation=rotation, eps=norm.eps, one_plus=False)
        norm.like.settle(r)
        scope.record.fuse("residual+norm+modulate+int8")
        return tuple(coded)
    if term is not None and norm.rms and scaled.shift is None and sandwiched(norm, term.like):
        r, *coded = sandwich_residual_int8(
            residual.like, plain(term.like.like), term.row, term.like.weight, norm.weight, scaled.row, rotation=rotation, eps=norm.eps, one_plus=False)
        norm.like.settle(r)
        scope.record.fuse("norm+residual+norm+modulate+int8")
        return tuple(coded)
    coded = modulate_int8(plain(norm.like), scaled.row, scaled.shift, norm.weight, rotation=rotation, rms=norm.rms, eps=norm.eps, one_plus=False)
    scope.record.fuse("norm+modulate+int8")
    return coded


def sandwiched(before: Norm, after) -> bool:
    """Two RMS norms of one epsilon, both with a weight: what the kernel knows."""
    return isinstance(after, Norm) and after.rms and after.eps == before.eps and after.weight is not None and before.weight is not None
