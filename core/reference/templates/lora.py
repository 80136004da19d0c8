"""Templates that make a LoRA: a single one, or a bank of them, of which some are chosen (Aesthetic).

    delta W = sum_i s_i up_i down_i          over the chosen ones, for every layer that any of them has

A bank stacks its matrices: down [n, r, in] and up [n, out, r]. Layers are named as the host's LoRA code knows them.
"""
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import comfy.hooks
import comfy.lora
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...knob import shown
from ..foreign import foreign
from .base import Shapes, WrongTemplate, seen
from .file import File

HALVES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
KEY = re.compile(rf"(?P<layer>.+)\.(?:(?P<half>{'|'.join(HALVES)})(?:\.default)?\.weight|(?P<alpha>alpha))")
SIDES = ("both", "positive", "negative")
SUMS = ("sum", "mean")

Lora = Mapping[str, tuple[Tensor, Tensor]]      # layer: down [r, in], up [out, r], no alpha left to multiply by


@dataclass(frozen=True, eq=False)
class LoraBank:
    """keys: of each layer's "down", "up" and "alpha" in the file; count: of LoRAs; stacked: along a first dimension."""

    file: File
    keys: Mapping[str, Mapping[str, str]]
    count: int
    stacked: bool

    name, options = "LoRA", ()

    @classmethod
    def recognises(cls, shapes: Shapes) -> bool:
        return bool(shapes) and all(KEY.fullmatch(key) for key in shapes)

    @classmethod
    def read(cls, file: File) -> "LoraBank":
        keys: dict[str, dict[str, str]] = {}
        for key in file.shapes:
            match = KEY.fullmatch(key)
            keys.setdefault(match["layer"], {})[HALVES.get(match["half"], "alpha")] = key
        counts = set()
        for layer, parts in keys.items():
            if not {"down", "up"} <= set(parts):
                raise WrongTemplate(f"{file.name} has only {seen(list(parts.values()))} of {layer}; it is not whole, download it again")
            down, up = file.shapes[parts["down"]], file.shapes[parts["up"]]
            if len(down) != len(up) or len(down) not in (2, 3) or down[:-2] != up[:-2] or down[-2] != up[-1]:
                raise WrongTemplate(f"{file.name}: the halves of {layer} are {list(down)} and {list(up)}; expected [rank, in] and [out, rank], "
                                    "or as many of both stacked")
            counts.add(down[:-2])
            alpha = file.shapes.get(parts.get("alpha"), ())
            if alpha not in ((), (1,), down[:-2]):
                raise WrongTemplate(f"{file.name} has {parts['alpha']} of shape {list(alpha)}; expected one number, or one for each LoRA of a bank")
        if len(counts) != 1:
            raise WrongTemplate(f"{file.name} has layers of {', '.join(sorted(str(list(c)) for c in counts))} LoRAs; expected as many in every layer")
        stacked = counts.pop()
        return cls(file, keys, stacked[0] if stacked else 1, bool(stacked))

    def loras(self, ids: Sequence[int]) -> list[Lora]:
        """The LoRAs of these numbers, counted from 0."""
        if wrong := [i for i in ids if not 0 <= i < self.count]:
            raise ValueError(f"LoRA {wrong[0]} was asked of {self.file.name}, which has {self.count}, counted from 0; choose among those")
        tensors = self.file.tensors()

        def half(layer: str, part: str, i: int) -> Tensor:
            tensor = tensors[self.keys[layer][part]]
            return tensor[i] if self.stacked else tensor

        def pair(layer: str, i: int) -> tuple[Tensor, Tensor]:
            down, up = half(layer, "down", i), half(layer, "up", i)
            if "alpha" not in self.keys[layer]:
                return down, up
            alpha = tensors[self.keys[layer]["alpha"]].flatten()
            return down, up.float() * (float(alpha[i if len(alpha) > 1 else 0]) / down.shape[0])

        return [{layer: pair(layer, i) for layer in self.keys} for i in ids]


def merged(loras: Sequence[Lora], scales: Sequence[float]) -> dict[str, Tensor]:
    """One LoRA, in the host's words, whose change of a layer is the sum of theirs; a layer need not be in all of them."""
    result = {}
    for layer in dict.fromkeys(layer for lora in loras for layer in lora):
        held = [(*lora[layer], scale) for lora, scale in zip(loras, scales, strict=True) if layer in lora]
        result[f"{layer}.lora_down.weight"] = torch.cat([down for down, _, _ in held], dim=0)
        result[f"{layer}.lora_up.weight"] = torch.cat([up.float() * scale for _, up, scale in held], dim=1)
    return result


def chosen(text: str, count: int) -> list[int]:
    """The numbers of "0, 3-5", each once; all where the text is empty."""
    found: list[int] = []
    for part in text.split(",") if text.strip() else [f"0-{count - 1}"]:
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not numbers or numbers[-1] >= count:
            raise ValueError(f"the LoRAs to take are '{shown(text)}'; expected numbers from 0 to {count - 1}, such as 0, 3-5, or nothing for all")
        found += numbers
    return list(dict.fromkeys(found))


def unfit(model, lora: Mapping[str, Tensor], source: str) -> str:
    """Why a model cannot take this LoRA, in a sentence; the host would leave such layers out."""
    if why := foreign(source, model.model.diffusion_model):
        return why
    known, kind = comfy.lora.model_lora_keys_unet(model.model, {}), type(model.model).__name__
    layers = [key.removesuffix(".lora_down.weight") for key in lora if key.endswith(".lora_down.weight")]
    if strange := [layer for layer in layers if layer not in known]:
        return f"{source} changes layers that {kind} has not ({seen(strange)}); use it with the model that it was made for"
    for layer in layers:
        place = known[layer]
        key, cut = (place, None) if isinstance(place, str) else place[:2]
        module = comfy.utils.get_attr(model.model, key.removesuffix(".weight"))
        wants = [module.out_features, module.in_features] if hasattr(module, "out_features") else list(module.weight.shape)
        wants = [cut[2], *wants[1:]] if cut else wants
        has = [lora[f"{layer}.lora_up.weight"].shape[0], lora[f"{layer}.lora_down.weight"].shape[1]]
        if has != wants:
            return f"{source} changes {layer} as a weight of shape {has}, and in {kind} it is {wants}; use it with the model that it was made for"
    return ""


def applied(model, positive, negative, lora: Mapping[str, Tensor], strength: float, side: str, source: str) -> tuple:
    """Model, positive and negative with the LoRA: on the weights where both sides have it, else as a hook of the one side's conditioning."""
    if side not in SIDES:
        raise ValueError(f"the side is '{shown(side)}'; choose one of {', '.join(SIDES)}")
    if why := unfit(model, lora, source):
        raise ValueError(why)
    if side == "both":
        return comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0)[0], positive, negative
    given = {"positive": positive, "negative": negative}
    if given[side] is None:
        raise ValueError(f"{source} is to act on the {side} prompt alone and none is connected; connect it, or let it act on both")
    given[side] = comfy.hooks.set_hooks_for_conditioning(given[side], comfy.hooks.create_hook_lora(dict(lora), strength, 0.0))
    return model, given["positive"], given["negative"]
