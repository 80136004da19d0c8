"""Kernels as torch operators, `torch.ops.reprise.<name>`: what torch.compile calls without looking inside.

A reference is plain torch and serves every device. On what torch calls "cuda", AMD's GPUs too, the operator decides, each time,
whether Triton takes the arguments; `usable` says no for AMD's.
"""
import inspect
from collections.abc import Callable

import torch

from ._triton import usable

NAMESPACE = "reprise"


def operator(name: str, reference: Callable, fused: Callable, fake: Callable, fits: Callable[..., bool] = lambda **given: True) -> Callable:
    """The operator `name`. All four take the same arguments; the annotations of `reference` are its signature.

    No output may share memory with an input. fake: shapes and types of the outputs, as empty tensors.
    fits: whether the Triton kernel takes these arguments, on a device where Triton works; the reference takes the rest.
    """
    if known := registered(name):       # the pack was imported under another name too
        signature = torch.library.infer_schema(reference, mutates_args=())
        if known._schema != torch._C.parse_schema(f"{NAMESPACE}::{name}{signature}"):
            raise RuntimeError(f"another Reprise in this process has a {NAMESPACE}::{name} with other arguments; keep one copy of the pack in custom_nodes")
        return known

    made = torch.library.custom_op(f"{NAMESPACE}::{name}", reference, mutates_args=())
    made.register_kernel("cuda")(choice(reference, fused, fits))
    made.register_fake(fake)
    return registered(name)


def registered(name: str) -> Callable | None:
    packet = getattr(getattr(torch.ops, NAMESPACE), name, None)
    return packet and packet.default


def choice(reference: Callable, fused: Callable, fits: Callable[..., bool]) -> Callable:
    """The function of the arguments of all three that lets Triton do what it can."""
    parameters = inspect.signature(reference)

    def chosen(*args, **options):
        given = parameters.bind(*args, **options).arguments
        first = next(value for value in given.values() if isinstance(value, torch.Tensor))
        return (fused if usable(first.device) and fits(**given) else reference)(**given)

    return chosen
