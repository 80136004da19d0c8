"""Kernels as torch operators, `torch.ops.reprise.<name>`: what torch.compile calls without looking inside.

A reference is plain torch and serves every device. On what torch calls "cuda", AMD's GPUs too, the operator decides, each time,
whether Triton takes the arguments; `usable` says no for AMD's.
"""
import inspect
import logging
from collections.abc import Callable

import torch

from ._triton import FAILURES, out_of_memory, told, usable

NAMESPACE = "reprise"
logger = logging.getLogger(__name__)


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
    made.register_kernel("cuda")(choice(name, reference, fused, fits))
    made.register_fake(fake)
    return registered(name)


def registered(name: str) -> Callable | None:
    packet = getattr(getattr(torch.ops, NAMESPACE), name, None)
    return packet and packet.default


def choice(name: str, reference: Callable, fused: Callable, fits: Callable[..., bool]) -> Callable:
    """The function of the arguments of all three that lets Triton do what it can.

    Where a kernel cannot be compiled or launched on a device, one line in the log says so and the reference does its work there from then on.
    """
    parameters, given_up = inspect.signature(reference), set()

    def chosen(*args, **options):
        given = parameters.bind(*args, **options).arguments
        device = next(value for value in given.values() if isinstance(value, torch.Tensor)).device
        if device not in given_up and usable(device) and fits(**given):
            try:
                return fused(**given)
            except FAILURES as error:
                if out_of_memory(error):    # the host knows what to do then
                    raise
                given_up.add(device)
                logger.warning("Reprise: the kernel %s does not run on %s (%s); plain torch does its work, slower", name, device, told(error))
        return reference(**given)

    return chosen
