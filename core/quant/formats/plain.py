"""Weights at full precision: bf16, fp16, fp32."""
import torch
from torch import Tensor

from ..files import WeightFile
from ..layer import Layer

FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WEIGHT = ".weight"


class Plain:
    names = ("bf16", "fp16", "fp32")
    note = "Weights at full precision."

    def claim(self, file: WeightFile, left: dict):
        for key in [key for key, tensor in left.items() if key.endswith(WEIGHT) and isinstance(tensor, Tensor)]:
            weight = left[key]
            if weight.dtype in FLOATS and weight.ndim == 2:
                del left[key]
                yield Layer(
                    name=key.removesuffix(WEIGHT), format=FLOATS[weight.dtype], shape=tuple(weight.shape),
                    unpack=lambda start, stop, weight=weight: weight[start:stop], nbytes=weight.nbytes, host={WEIGHT: weight})
