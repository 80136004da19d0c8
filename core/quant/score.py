"""How much each layer minds each format, on the activations of a short run.

    e(format) = |x W'ᵀ - x Wᵀ| / |x Wᵀ|     over rows x that the run really sent through the layer

W' is computed with as the host computes with it, its quantized activations included. Two published scores say which layers count
for more: J = |x|_F / sqrt(B N C), the size of a layer's activations (LRQ-DiT, arXiv 2508.03485, where J >= 1 asks for stronger
rotation), and Γ = mean|block(x) - x| / mean|x|, by how much the layer's block changes its stream (6Bit-Diffusion, 2603.18742).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn

from ..families import family_of
from .layer import Layer
from .sensitive import is_sensitive
from .transcode import TRANSCODERS, can

ROWS = 16           # of each evaluation, spread evenly over its tokens
MOST_ROWS = 128     # of a layer
SCORES = ("output error", "activation", "block difference")


@dataclass
class Listener:
    """What a run sent through the layers of a network: a few rows of each, on the CPU, and how much its blocks changed."""

    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    changes: dict[str, list[float]] = field(default_factory=dict)

    def hear(self, name: str, x: Tensor) -> None:
        kept = self.rows.setdefault(name, [])
        if sum(len(part) for part in kept) < MOST_ROWS:
            kept.append(spread(x, ROWS).to("cpu", torch.float32, copy=True))

    def activations(self, name: str) -> Tensor:
        return torch.cat(self.rows[name])

    def change(self, layer: str) -> float:
        """Γ of the block that a layer is in; 1 for one that is in none."""
        block = next((block for block in self.changes if layer.startswith(block + ".")), None)
        return 1.0 if block is None else sum(self.changes[block]) / len(self.changes[block])


@dataclass(frozen=True)
class Scored:
    """One layer: its size, the error that each target would put on its output, and the published scores."""

    name: str
    weights: int
    errors: Mapping[str, float]
    activation: float       # J
    change: float           # Γ

    def cost(self, target: str, score: str) -> float:
        """What a target costs, for choosing: the square of its error, weighed by the score."""
        weight = {"output error": 1.0, "activation": max(self.activation, 1e-6), "block difference": max(self.change, 1e-6)}[score]
        return 0.0 if target == "full" else weight * self.errors[target] ** 2


def spread(x: Tensor, count: int) -> Tensor:
    """At most `count` of the rows of [..., K], evenly spread."""
    flat = x.reshape(-1, x.shape[-1])
    step = max(1, math.ceil(len(flat) / count))
    return flat[::step]


def measured_layers(network: nn.Module, family: str) -> dict[str, nn.Linear]:
    """The linear layers that a plan is about: those that are not sensitive."""
    return {name: module for name, module in network.named_modules()
            if hasattr(module, "in_features") and getattr(module, "weight", None) is not None and not is_sensitive(name, family)}


@contextmanager
def listening(network: nn.Module, layers: Mapping[str, nn.Module]):
    """A Listener for the time of a run; no hook is left behind, however the run ends."""
    listener, hooks = Listener(), []
    try:
        for name, module in layers.items():
            hooks.append(module.register_forward_pre_hook(lambda module, args, name=name: listener.hear(name, args[0])))
        family = family_of(network)
        names = {id(module): name for name, module in network.named_modules()}
        for _, block in family.blocks(network) if family else ():
            hooks += listen_to_block(listener, names[id(block)], block)
        yield listener
    finally:
        for hook in hooks:
            hook.remove()


def listen_to_block(listener: Listener, name: str, block: nn.Module) -> list:
    """Hooks that compare what goes into a block with what comes out. Blocks write in place, so the input is copied."""
    seen = []

    def before(module, args, kwargs):
        stream = next((value for value in (*args, *kwargs.values()) if torch.is_tensor(value) and value.ndim == 3), None)
        seen[:] = [] if stream is None else [spread(stream, ROWS).float().clone()]

    def after(module, args, result):
        stream = result[0] if isinstance(result, tuple) else result
        if seen and torch.is_tensor(stream):
            came, went = seen.pop(), spread(stream, ROWS).float()
            if came.shape == went.shape:
                listener.changes.setdefault(name, []).append(((went - came).abs().mean() / came.abs().mean().clamp_min(1e-12)).item())

    return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]


def scored(layers: Mapping[str, nn.Module], listener: Listener, targets: tuple[str, ...], device: torch.device, dtype: torch.dtype,
           tick: Callable[[], None] = lambda: None) -> list[Scored]:
    """Every layer that the run went through, measured one after the other: a layer in full precision at a time."""
    found = []
    for name, module in layers.items():
        if name in listener.rows:
            x = listener.activations(name).to(device)
            found.append(Scored(name, module.in_features * module.out_features, errors_of(name, module, x, targets, dtype),
                                activation=(x.norm() / math.sqrt(x.numel())).item(), change=listener.change(name)))
        comfy.model_management.throw_exception_if_processing_interrupted()
        tick()
    return found


def errors_of(name: str, module: nn.Module, x: Tensor, targets: tuple[str, ...], dtype: torch.dtype) -> dict[str, float]:
    weight, bias, stream = comfy.ops.cast_bias_weight(module, x, offloadable=True)     # with its LoRAs, from wherever it is
    try:
        true = x @ weight.T
        layer = Layer(name=name, format="", shape=tuple(weight.shape), unpack=lambda start, stop: weight[start:stop], nbytes=0)
        size = true.norm().clamp_min(1e-12)
        return {target: ((product(layer, target, x, dtype).float() - true).norm() / size).item() for target in targets if can(target, layer.shape)}
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def product(layer: Layer, target: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x W'ᵀ as a layer of the host computes it on this device."""
    ops = comfy.ops.pick_operations(None, dtype, load_device=x.device, model_config=SimpleNamespace(quant_config={"mixed_ops": True}))
    linear = ops.Linear(layer.shape[1], layer.shape[0], bias=False, device=x.device, dtype=dtype)
    linear.load_state_dict({end.removeprefix("."): part for end, part in TRANSCODERS[target](layer, x.device).items()}, strict=False)
    return linear(x.to(dtype))
