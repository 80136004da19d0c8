"""A tensor that is not computed yet: what a block is about to hand to its next product, as an expression.

    Deferred(scope, expression)

Some operations turn one expression into another (rules.py), and a linear layer may compute a whole expression in one kernel
(products.py). Every other operation, of the host or of another node, first computes the value by the host's own operations in
the host's order, and then sees a plain tensor. So what is not known here is right, and merely not faster.

An expression refers to its inputs and does not copy them. It is right as long as nobody writes into these before it is used;
in the host's blocks the next operation uses it. Once computed, the value is the tensor and the expression is forgotten.
"""
from __future__ import annotations

import torch
from torch import Tensor

# What is answered without computing: sizes and types are known.
METADATA = {
    getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_mps", "is_meta", "is_sparse", "is_quantized", "is_nested",
        "itemsize",
    )
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex,
    torch.is_complex, Tensor.element_size, Tensor.get_device,
}
RULES: dict = {}        # operation -> rule; rules.py fills it. An operator of torch.ops stands there by its name


class Deferred(torch.Tensor):
    """Of the shape, type and device that its expression tells; contiguous as far as anyone is told without computing."""

    @staticmethod
    def __new__(cls, scope, expression):
        return torch.Tensor._make_wrapper_subclass(cls, expression.shape, dtype=expression.dtype, device=expression.device)

    def __init__(self, scope, expression):
        self.scope, self.expression, self.value = scope, expression, None
        self.codes: dict[bool, tuple[Tensor, Tensor]] = {}      # by rotation: two products may take the same

    def plain(self) -> Tensor:
        """The value; computed once."""
        if self.value is None:
            self.settle(self.expression.compute())
        return self.value

    def settle(self, value: Tensor) -> None:
        """The value is known; whoever writes into it makes the expression wrong, so that is dropped."""
        self.value, self.expression, self.codes = value, None, {}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = RULES.get(func) or RULES.get(getattr(func, "_qualified_op_name", None))
        made = None if rule is None else rule(args, kwargs)
        if made is not None:
            return made
        if func is not torch.nn.functional.linear:
            for thing in (*args, *kwargs.values()):
                told(thing)
        return func(*plain(args), **plain(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """For whatever came past __torch_function__, as C++ does."""
        return func(*plain(args), **plain(kwargs or {}))


def told(thing) -> None:
    """Notes that a value which a product might have computed by itself is read by something else first."""
    if isinstance(thing, Deferred) and thing.expression is not None and not thing.codes and thing.expression.awaited:
        thing.scope.record.leave("of values that something else reads first")


def plain(thing):
    """The same with every Deferred in it computed; in lists, tuples and dicts too."""
    if isinstance(thing, Deferred):
        return thing.plain()
    if isinstance(thing, (list, tuple)):
        made = [plain(part) for part in thing]
        if isinstance(thing, tuple) and hasattr(thing, "_fields"):
            return type(thing)(*made)
        return made if isinstance(thing, list) else tuple(made)
    if isinstance(thing, dict):
        return {key: plain(part) for key, part in thing.items()}
    return thing


def pending(thing, *kinds):
    """The expression of a Deferred that is one of `kinds` and not computed yet; None for anything else."""
    expression = thing.expression if isinstance(thing, Deferred) else None
    return expression if isinstance(expression, kinds) else None
