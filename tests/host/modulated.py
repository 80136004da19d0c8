"""What the tests of Modulation Cache share: a model with it, the host's own modulations, weights that are gone, and a LoRA."""
import math

import comfy.sd
import torch
from harness import model

from pack.core.families import family_of
from pack.core.quant.modulation import attach_modulation_cache
from pack.core.quant.stand_in import layers, original

SERVED = ["flux", "qwen_image", "sd3", "flux_longcat", "hunyuan_video", "hunyuan_image", "hidream_i1", "aura"]
NAMED = ["flux", "qwen_image", "sd3"]
STEPS = 5


def cached(name: str, patcher=None, records: list | None = None):
    clone, saving = attach_modulation_cache(patcher or model(name), (records if records is not None else []).append)
    assert not saving.why
    return clone


def network(patcher):
    return patcher.model.diffusion_model


def modulations(patcher) -> dict:
    """The host's own modules, by their paths in the model."""
    paths = family_of(network(patcher)).modulations(network(patcher))
    return {f"diffusion_model.{path}": original(patcher, f"diffusion_model.{path}") for path in paths}


class Poison:
    """From the given step on, no weight of a modulation is a number; afterwards they are what they were."""

    def __init__(self, patcher, step: int = 0):
        self.weights, self.step, self.done = [p for m in modulations(patcher).values() for p in m.parameters()], step, False

    def __enter__(self):
        self.kept = [weight.clone() for weight in self.weights]
        return self

    def __call__(self, step, *args):
        if step == self.step:
            self.done = True
            for weight in self.weights:
                weight.data.fill_(math.nan)

    def __exit__(self, *error):
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data.copy_(kept)
        assert self.done or error[0]


def lora(name: str, seed: int = 8) -> dict:
    """One that changes a modulation and another layer, weight and bias."""
    patcher = model(name)
    path, module = list(modulations(patcher).items())[1]
    key, layer = next(layers(module, path))
    other = next(key for key in patcher.model.state_dict() if "attn" in key and key.endswith(("qkv.weight", "to_q.weight")))
    generator = torch.Generator().manual_seed(seed)
    made = {f"{key}.diff_b": torch.randn(layer.bias.shape, generator=generator)}
    for layer_key, shape in ((key, layer.weight.shape), (other.removesuffix(".weight"), patcher.model.state_dict()[other].shape)):
        made[f"{layer_key}.lora_up.weight"] = torch.randn(shape[0], 4, generator=generator) * 0.2
        made[f"{layer_key}.lora_down.weight"] = torch.randn(4, shape[1], generator=generator) * 0.2
    return made


def with_lora(patcher, name: str, strength: float, bypass: bool = False):
    load = comfy.sd.load_bypass_lora_for_models if bypass else comfy.sd.load_lora_for_models
    return load(patcher, None, lora(name), strength, 0.0)[0]
