"""Fused Kernels where the host streams weights to the GPU: it fills two buffers in turn, so a weight lasts until the second cast after its own."""
from functools import cache

import comfy.memory_management
import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from fusing import ran, turned
from harness import network, sample

from pack.core.quant.fusion.sites import SITES
from testbed import tiny

NAMES = ["flux_13m", *(name for family in SITES for name in tiny.OF_FAMILY[family])]
ROOM = 64 << 20     # bytes of a buffer, more than any layer of these has


class Buffers:
    """What stands in for the host's cast. A weight is written from the start of the buffer whose turn it is, and giving it back changes nothing."""

    def __init__(self):
        self.turn, self.each, self.casts = 0, [torch.zeros(ROOM, dtype=torch.uint8) for _ in range(2)], 0

    def cast(self, module, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False, compute_dtype=None, want_requant=False):
        assert offloadable and not module.weight_function and not module.bias_function
        self.turn, self.casts = 1 - self.turn, self.casts + 1
        lent = comfy.memory_management.interpret_gathered_like([module.weight, module.bias], self.each[self.turn])
        for there, tensor in zip(lent, (module.weight, module.bias), strict=True):
            if tensor is not None:
                there.copy_(tensor)
        weight, bias = lent
        if input is not None:
            dtype = dtype or (input.params.orig_dtype if isinstance(input, QuantizedTensor) else input.dtype)
            bias_dtype = bias_dtype or dtype
        if weight.dtype != dtype:
            weight = weight.to(dtype)
            weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        return weight, None if bias is None else bias.to(bias_dtype), (None, None, None)


@cache
def loaded(name: str, weights: str):
    """A model in which no two weights of norms are alike, so that one in the place of another is seen."""
    if weights == "int8":
        patcher = turned(name, 256 if name == "flux_13m" else None)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comfy.model_management, "unet_manual_cast", lambda *args: None)      # to compute in bf16, as on a GPU
            patcher = tiny.patcher(name, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for module in network(patcher).modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.weight.copy_(1 + 0.3 * torch.randn(module.weight.shape, generator=generator))
    return patcher


def stream(patcher, monkeypatch) -> Buffers:
    buffers = Buffers()
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", buffers.cast)
    for module in network(patcher).modules():
        if isinstance(module, comfy.ops.CastWeightBiasOp):
            monkeypatch.setitem(vars(module), "comfy_cast_weights", True)
    return buffers


@pytest.mark.parametrize("layers", ["all", "int8"])
@pytest.mark.parametrize("weights", ["int8", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_weights_give_the_same_bits_as_weights_on_the_gpu(name, weights, layers, monkeypatch):
    patcher = loaded(name, weights)
    host, (resident, record) = sample(patcher, name, steps=2), ran(patcher, name, {"steps": 2}, layers=layers)
    buffers = stream(patcher, monkeypatch)
    assert torch.equal(sample(patcher, name, steps=2), host) and buffers.casts
    streamed, other = ran(patcher, name, {"steps": 2}, layers=layers)
    assert torch.equal(streamed, resident) and other.fused == record.fused
    assert sum("modulate" in what for what in record.fused) or (weights, layers) == ("bf16", "int8")
