"""Where in a family's blocks values come up that may wait: module names, as data.

norms are called on the tokens and modulated right after, activations stand in front of a product, outputs are products that are gated.
"""
from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import nn

from ...families.base import module_at
from .deferred import Deferred, plain
from .expressions import Activation, Norm, Packed, Product, Silu
from .heads import is_like
from .heads import norms as of_heads
from .scope import Scope


@dataclass(frozen=True)
class Site:
    """Paths in each block of `stack`; a block that lacks one is without it. packed: a product of q, k and v. qk_norms: norms of q and k."""

    stack: str
    norms: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()
    qk_norms: tuple[str, ...] = ()


JOINT = {
    "norms": ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"), "outputs": ("feed_forward.w1",), "packed": ("attention.qkv",),
}
SITES = {       # family -> sites
    "flux": (
        Site("double_blocks", norms=("img_norm1", "txt_norm1", "img_norm2", "txt_norm2"), activations=("img_mlp.1", "txt_mlp.1"),
             outputs=("img_attn.proj", "img_mlp", "txt_attn.proj", "txt_mlp"), packed=("img_attn.qkv", "txt_attn.qkv"),
             qk_norms=("img_attn.norm", "txt_attn.norm")),
        Site("single_blocks", norms=("pre_norm",), activations=("mlp_act",), outputs=("linear2",), packed=("linear1",), qk_norms=("norm",)),
    ),
    "nextdit": (Site("noise_refiner", **JOINT), Site("layers", **JOINT)),
}
ONE_AT_A_TIME = threading.Lock()
HALVES = "SiLUActivation"       # the host's, of FLUX.2: silu of the first half of the channels times the second


def replacements(scope: Scope, sites: tuple[Site, ...], network: nn.Module, weight: Callable) -> Iterator[tuple[nn.Module, Callable]]:
    """(module, what is to be its forward for one evaluation). weight: (norm module, tensor) -> its weight for that."""
    for site in sites:
        blocks = list(module_at(network, site.stack) or ())
        ours = dict.fromkeys(blocks)
        for block, after in zip_longest(blocks, blocks[1:]):
            if not of_the_host(block):
                scope.record.others += 1
                continue
            scope.record.blocks += 1
            for paths, make in ((site.norms, norm), (site.activations, activation), (site.outputs, output), (site.packed, packed), (site.qk_norms, qk_norms)):
                for module in (module_at(block, path) for path in paths):
                    if module is not None and (forward := make(scope, module, weight)) is not None:
                        yield module, forward
            yield block, ending(scope, block, after, ours)


def of_the_host(module: nn.Module) -> bool:
    """Whether the code that runs is torch's or the host's: its class is, and no other node has put a forward of its own in that one's place.

    A forward that runs the one before it and nothing in its place, as Step Cache's, names that one as `runs`.
    """
    forward = vars(module).get("forward")
    while hasattr(forward, "runs"):
        forward = forward.runs
    foreign = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    return not foreign and type(module).__module__.partition(".")[0] in ("torch", "comfy")


def wholly_of_the_host(module: nn.Module) -> bool:
    return all(of_the_host(part) for part in module.modules())


def norm(scope: Scope, module: nn.Module, weight: Callable):
    rms, own = isinstance(module, nn.RMSNorm), getattr(module, "weight", None)
    if not rms and not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1 or not rms and own is not None:
        return None
    if not scope.kernels or not of_the_host(module):
        return None
    before = module.forward

    def forward(x, *args, **kwargs):
        if args or kwargs or not scope.takes(x) or x.shape[-1] != module.normalized_shape[0]:
            return before(x, *args, **kwargs)
        taken = None if own is None else weight(module, x)
        if taken is not None and not is_like(taken, x):
            return before(x)
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps      # what torch takes for none, also in 16 bits
        return Deferred(scope, Norm(x, rms, eps, taken))
    return forward


def qk_norms(scope: Scope, module: nn.Module, weight: Callable):
    return of_heads(scope, module, weight) if wholly_of_the_host(module) else None


def activation(scope: Scope, module: nn.Module, weight: Callable):
    before, name = module.forward, type(module).__name__
    if not wholly_of_the_host(module):
        return None
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        make = lambda a: Activation(a, None, lambda: before(a))
    elif isinstance(module, nn.SiLU) and scope.kernels:
        make = lambda a: Silu(a, before)
    elif name == HALVES and scope.kernels:
        make = lambda a: Activation(*a.chunk(2, -1), lambda: before(a))
    else:
        return None

    def forward(x, *args, **kwargs):
        x = plain(x)
        return before(x, *args, **kwargs) if args or kwargs or not scope.takes(x) else Deferred(scope, make(x))
    return forward


def output(scope: Scope, module: nn.Module, weight: Callable, kind=Product):
    before = module.forward
    if not scope.kernels:
        return None

    def forward(x, *args, **kwargs):
        y = plain(before(x, *args, **kwargs))
        return Deferred(scope, kind(y)) if scope.takes(y) else y
    return forward


def packed(scope: Scope, module: nn.Module, weight: Callable):
    return output(scope, module, weight, Packed)


def untouched(block: nn.Module) -> bool:
    """Whether nothing wraps or watches it."""
    return "forward" not in vars(block) and unwatched(block)


def unwatched(block: nn.Module) -> bool:
    return not block._forward_hooks and not block._forward_pre_hooks


def ending(scope: Scope, block: nn.Module, after: nn.Module | None, ours: dict):
    """What leaves a block is computed, unless nobody but the block after it sees it, or the host's own code after the last.

    ours: block -> a reference to the forward that is set here, None where there is none or something watches the block.
    """
    before = block.forward

    def held(one) -> bool:
        return ours[one] is not None and vars(one).get("forward") is ours[one]()

    def forward(*args, **kwargs):
        scope.turning = scope.kernels and scope.every and scope.open and kwargs.get("pe") is not None
        scope.enter((*args, *kwargs.values()) if scope.sealed and unwatched(block) else ())
        result = before(*args, **kwargs)
        scope.enter(())
        return result if scope.open and held(block) and (after is None or held(after)) else plain(result)
    if untouched(block):
        ours[block] = weakref.ref(forward)      # it knows `ours`: a circle would hold a dropped model's weights until Python looks for circles
    return forward


@contextmanager
def replaced(found: Callable[[], Iterable[tuple[nn.Module, Callable]]]) -> Iterator[None]:
    """Sets `forward` of each module and puts back what was there, last one first.

    found: asked while no other thread sets or puts back anything. What another one has set is foreign code to it, so it finds no module
    twice, and nobody puts back a forward whose run is over.
    """
    there = []
    try:
        with ONE_AT_A_TIME:
            for module, forward in list(found()):
                there.append((module, vars(module).get("forward")))
                module.forward = forward
        yield
    finally:
        with ONE_AT_A_TIME:
            for module, before in reversed(there):
                if before is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = before
