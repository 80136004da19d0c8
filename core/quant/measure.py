"""Quantization Report: a short run that is listened to, the layers' errors, and a plan for the loader."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import torch
from comfy.quant_ops import QuantizedTensor

from ..knob import shown
from .budget import planned, size
from .loader import family_of
from .score import Scored, listening, measured_layers, scored

WORST = 12      # layers that the text names


@dataclass(frozen=True)
class Measured:
    """The layers of a model, and what was left out as sensitive, in bytes."""

    layers: Sequence[Scored]
    others: int
    score: str

    def plan(self, budget_mib: float) -> dict[str, str]:
        """Within a budget for all weights of the model; 0 takes 8 bits everywhere."""
        if not budget_mib:
            return {layer.name: min((t for t in layer.errors if t != "nvfp4"), key=layer.errors.__getitem__) for layer in self.layers}
        return planned(self.layers, budget_mib * 2**20, self.score, self.others)

    def text(self, plan: dict[str, str]) -> str:
        """A table of the layers that mind most, and what the plan comes to."""
        targets = sorted({target for layer in self.layers for target in layer.errors})
        lines = [f"{len(self.layers)} layers, {sum(layer.weights for layer in self.layers) / 1e6:.1f} M weights; "
                 f"{self.others / 2**20:.1f} MiB of others stay as they are"]
        for target in targets:
            errors = sorted(layer.errors[target] for layer in self.layers if target in layer.errors)
            lines.append(f"{target}: relative error of a layer's output {errors[len(errors) // 2]:.4f} in the median, {errors[-1]:.4f} at most")
        total = sum(size(layer, plan[layer.name]) for layer in self.layers) + self.others
        counts = Counter(plan.values())
        lines.append(f"plan: {', '.join(f'{count} {target}' for target, count in counts.most_common())}; {total / 2**20:.1f} MiB of weights")
        lines.append(f"the {min(WORST, len(self.layers))} layers that mind most, by {self.score}:")
        worst = sorted(self.layers, key=lambda layer: -max(layer.cost(target, self.score) for target in layer.errors))[:WORST]
        lines += [f"  {layer.name}: {', '.join(f'{target} {error:.4f}' for target, error in layer.errors.items())}; "
                  f"J {layer.activation:.2f}, block change {layer.change:.2f}; plan {plan[layer.name]}" for layer in worst]
        return "\n".join(lines)


def measure(model, positive, negative, sampler, sigmas, latent_image: dict, cfg: float, seed: int, targets: tuple[str, ...], score: str,
            bar: Callable[[int], Callable[[], None]]) -> Measured:
    """One short run and its layers. `bar(total)` gives a function to call once for each step and layer."""
    network = model.model.diffusion_model
    layers = measured_layers(network, family_of(model.model.model_config))
    if not layers:
        raise ValueError(f"{type(network).__name__} has no linear layers to quantize")
    if packed := next((name for name, module in layers.items() if isinstance(module.weight, QuantizedTensor)), None):
        raise ValueError(f"the model is quantized already ('{packed}'), and errors would be told against that; load it at full precision, with compute bf16")
    if len(sigmas) < 2 or not bool(torch.isfinite(sigmas).all()) or not bool(sigmas.max() > 0):
        raise ValueError(f"sigmas are {shown(sigmas.tolist())}, and numbers that go down from above 0 were expected; connect a scheduler")
    latent = latent_image["samples"]
    noise = comfy.sample.prepare_noise(latent, seed)
    tick = bar(len(sigmas) - 1 + len(layers))
    with listening(network, layers) as listener:
        comfy.sample.sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, latent, callback=lambda *step: tick(), disable_pbar=True, seed=seed)
    if not listener.rows:
        raise ValueError("the run went through none of the model's layers; connect a sampler and sigmas of at least one step")
    comfy.model_management.load_models_gpu([model])
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    found = scored(layers, listener, targets, model.load_device, dtype, tick)
    if lost := next((layer.name for layer in found if not all(map(math.isfinite, layer.errors.values()))), None):
        raise ValueError(f"the errors of '{lost}' are no numbers, so the model, the prompt or the latent has values that are none; nothing was saved")
    measured = sum(2 * layer.weights for layer in found)
    whole = sum(parameter.numel() * 2 for parameter in network.parameters())
    return Measured(found, whole - measured, score)
