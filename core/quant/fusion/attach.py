"""Puts the pack's kernels into a model's blocks for the length of each evaluation.

Norms, activations and gated products of a block return a Deferred (deferred.py) instead of a value, and the host's own code does the
rest: what it multiplies, adds and joins is recorded, and its linear layers, which cast, patch and stream their weights as ever, run a
whole expression in one kernel. Modules get a `forward` of their own when the network is entered, which is gone when it is left.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_patcher
import comfy_kitchen
import torch
from comfy.patcher_extension import WrappersMP

from ....kernels._triton import failure, hindrance
from ...families import family_of
from ...wrappers import COMPILE, any_compiled, attached, options_of
from .deferred import plain
from .scope import Record, Scope
from .sites import SITES, replaced, replacements
from .weights import int8, of_norm

log = logging.getLogger("reprise")
KEY = "reprise.fused_kernels"
RUN = "reprise.fused_kernels.run"
COMPILED = "the model is compiled, and torch.compile fuses these operations itself"
LAYERS = ("all", "int8")


@dataclass(frozen=True)
class Settings:
    """layers: whether kernels go before int8 weights alone, or before all. forced: on any device, by their torch references too."""

    layers: str = "all"
    forced: bool = False
    kitchen: bool | None = None     # whether comfy_kitchen's int8 product is taken for fast; None: as it says itself

    def __post_init__(self):
        if self.layers not in LAYERS:
            raise ValueError(f"layers is '{self.layers}'; choose one of {', '.join(LAYERS)}")


@dataclass(frozen=True)
class Attachment:
    settings: Settings
    notify: Callable[[Record], None]


def attach_fused_kernels(model, settings: Settings | None = None, notify: Callable[[Record], None] = lambda record: None):
    """A clone of `model` with the kernels in its blocks; a second call replaces what the first set."""
    wrappers = {WrappersMP.OUTER_SAMPLE: outer_sample, WrappersMP.DIFFUSION_MODEL: diffusion_model}
    return attached(model, KEY, Attachment(settings or Settings(), notify), wrappers)


def outer_sample(executor, *args, **kwargs):
    guider = executor.class_obj
    options = guider.model_options
    attachment = options.get("transformer_options", {}).get(KEY)
    if attachment is None:      # a guider that took the wrappers along but not the options
        return executor(*args, **kwargs)
    unknown = unserved(guider.model_patcher.get_model_object("diffusion_model"))
    record = Record(reason=COMPILED if by_compile(options["transformer_options"]) else unknown or "the network was not evaluated")
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    guider.model_options["transformer_options"][RUN] = record
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = options
        log.info(record.line())
        attachment.notify(record)


def diffusion_model(executor, *args, **kwargs):
    if torch.compiler.is_compiling():   # asked before anything of the run is looked at, which a graph would be compiled anew for
        return executor(*args, **kwargs)
    options = options_of(args, kwargs)
    attachment, record = options.get(KEY), options.get(RUN)
    if attachment is None or record is None:
        return executor(*args, **kwargs)
    network = executor.class_obj
    x = args[0] if args else kwargs.get("x")
    scope = scope_of(attachment.settings, record, network, x, options)
    if scope is None:
        return executor(*args, **kwargs)
    record.blocks = record.others = 0
    with replaced(lambda: replacements(scope, SITES[family_of(network).name], network, of_norm)):
        result = executor(*args, **kwargs)
    record.evaluations += 1
    return plain(result)


def scope_of(settings: Settings, record: Record, network, x, options: dict) -> Scope | None:
    """None, and the record says why, where the network is left alone."""
    if why := unserved(network):
        record.reason = why
        return None
    if by_compile(options) or not record.evaluations and compiled(network):
        record.reason = COMPILED
        return None
    device = x.device if isinstance(x, torch.Tensor) else torch.device("cpu")
    why = "" if settings.forced else hindrance(device) or failure(device)
    kernels = not why
    kitchen = is_fast(device) if settings.kitchen is None else settings.kitchen
    if not kernels and not kitchen:
        record.reason = why
        return None
    record.reason = f"{why}, so comfy_kitchen's int8 product with GELU inside is all that is used" if why else ""
    sealed = not options.get("patches_replace", {}).get("dit")
    return Scope(record, int8, kernels, kitchen, settings.layers == "all", sealed and not options.get("patches"), sealed)


def unserved(network) -> str:
    """Why a network gets no kernels, whatever the device; empty where it does. Some of the host's never call the wrapper that would tell."""
    family = family_of(network)
    served = family is not None and family.name in SITES
    return "" if served else f"{type(network).__name__} is of no family that has fused kernels; FLUX, FLUX.2, Z-Image and Lumina 2 are"


def by_compile(options: dict) -> bool:
    """Whether the host's own node has compiled the model or parts of it."""
    return any(kind.get(COMPILE) for kind in options.get("wrappers", {}).values())


def compiled(network) -> bool:
    """Whether some of it was compiled by other means; a forward of ours inside would be compiled anew for each evaluation."""
    return any_compiled(network.modules())


def is_fast(device: torch.device) -> bool:
    """Whether comfy_kitchen serves int8 products by its CUDA backend, which takes GELU along."""
    backend = comfy_kitchen.list_backends().get("cuda", {})
    return device.type == "cuda" and bool(backend.get("available")) and not backend.get("disabled") and "int8_linear" in backend.get("capabilities", ())
