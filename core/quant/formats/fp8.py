"""fp8 weights, with one scale for each layer or with none.

    W = q * s,  s = 1 where the file has none

Scales come as `weight_scale` or, in older files, as `scale_weight`; `scaled_fp8` marks such a file. An `input_scale` is the
scale of the activations that the file was calibrated for.
"""
import json

import torch
from torch import Tensor

from ..files import BadFile, WeightFile
from ..layer import Layer

FP8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
MARK = "scaled_fp8"
WEIGHT = ".weight"
SCALES, INPUTS = (".weight_scale", ".scale_weight"), (".input_scale", ".scale_input")


def marker(**told) -> Tensor:
    """The host's mark of a quantized layer: JSON as bytes."""
    return torch.tensor(list(json.dumps(told).encode("utf-8")), dtype=torch.uint8)


def fp8_weights(left: dict) -> list[str]:
    return [key.removesuffix(WEIGHT) for key, tensor in left.items()
            if key.endswith(WEIGHT) and isinstance(tensor, Tensor) and tensor.dtype in FP8 and tensor.ndim == 2]


def take(left: dict, name: str, ends: tuple[str, ...], file: WeightFile) -> Tensor | None:
    """A scale under the first of the keys that is there: one finite number."""
    for end in ends:
        scale = left.pop(name + end, None)
        if scale is None:
            continue
        if not isinstance(scale, Tensor) or scale.numel() != 1 or not scale.dtype.is_floating_point or not bool(scale.float().isfinite().all()):
            raise BadFile(f"'{file.name}': the scale '{name}{end}' is no single finite number; the file is damaged or of another kind of fp8")
        return scale.float().reshape(())
    return None


class ScaledFP8:
    names = tuple(f"{name} scaled" for name in FP8.values())
    note = "One scale for each layer; both spellings of its keys."

    def claim(self, file: WeightFile, left: dict):
        marks = [key for key in left if key == MARK or key.endswith("." + MARK)]
        full = any(left[mark].numel() == 2 for mark in marks)       # the older files' way to ask for products at full precision
        for mark in marks:
            del left[mark]
        for name in fp8_weights(left):
            scale = take(left, name, SCALES, file)
            if scale is None:
                if marks:
                    raise BadFile(f"'{file.name}' says that its fp8 weights have scales, and '{name}' has none; download it again")
                continue
            given, weight = take(left, name, INPUTS, file), left.pop(name + WEIGHT)
            host = {WEIGHT: weight, ".weight_scale": scale,
                    ".comfy_quant": marker(format=FP8[weight.dtype], **({"full_precision_matrix_mult": True} if full else {}))}
            if given is not None and given.item() != 1.0:
                host[".input_scale"] = given
            yield Layer(
                name=name, format=FP8[weight.dtype] + " scaled", shape=tuple(weight.shape), nbytes=weight.nbytes, host=host,
                unpack=lambda start, stop, weight=weight, scale=scale: weight[start:stop].float() * scale)


class UnscaledFP8:
    names = tuple(FP8.values())
    note = "A cast without scales, such as flux1-dev-fp8."

    def claim(self, file: WeightFile, left: dict):
        for name in fp8_weights(left):
            weight = left.pop(name + WEIGHT)
            yield Layer(
                name=name, format=FP8[weight.dtype], shape=tuple(weight.shape), nbytes=weight.nbytes, host={WEIGHT: weight},
                unpack=lambda start, stop, weight=weight: weight[start:stop].float())
