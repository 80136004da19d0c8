"""SD 1.5, SD 2, SDXL and SVD: a UNet.

L input blocks on the way down, a middle block, L output blocks on the way up; output block m takes what input block
L - 1 - m gave beside what comes from below. The blocks differ in cost by resolution, so one counts for its multiply-adds:

    cost = sum over its weights of |weight| x pixels    + 2 pixels^2 C for each self-attention

Weights that see only the time step or the text are left out: a few tokens against thousands of pixels.
"""
from dataclasses import dataclass
from math import prod

from .base import Family

UNET = Family(name="unet", models=("comfy.ldm.modules.diffusionmodules.openaimodel:UNetModel",), kind="unet")

OF_FEW_TOKENS = ("emb_layers", "attn2.to_k", "attn2.to_v")


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of the blocks, in order."""

    inputs: tuple[float, ...]
    middle: float
    outputs: tuple[float, ...]
    last: float     # the output layer, which runs on every step

    def share(self, inputs: int, outputs: int) -> float:
        """Of a full evaluation, what the first input blocks, the last output blocks and the output layer cost."""
        some = sum(self.inputs[:inputs]) + sum(self.outputs[len(self.outputs) - outputs:]) + self.last
        return some / (sum(self.inputs) + self.middle + sum(self.outputs) + self.last)


def costs(network, pixels: int) -> Costs:
    """`pixels` of the latent that the network is called with."""
    ways: list[list[float]] = []
    for blocks in (network.input_blocks, (network.middle_block,), network.output_blocks):
        ways.append([])
        for block in blocks:
            cost, pixels = cost_of(block, pixels)
            ways[-1].append(cost)
    inputs, (middle,), outputs = ways
    return Costs(tuple(inputs), middle, tuple(outputs), weights_cost(network.out, pixels))


def cost_of(block, pixels: float) -> tuple[float, float]:
    """The cost of a block that is given so many pixels, and how many it gives."""
    total = 0.0
    for layer in block.children() if block is not None else ():
        pixels *= {"Downsample": 1 / 4, "Upsample": 4}.get(type(layer).__name__, 1)
        total += weights_cost(layer, pixels)
    return total, pixels


def weights_cost(layer, pixels: float) -> float:
    total = 0.0
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim < 2 or any(part in name for part in OF_FEW_TOKENS):
            continue
        total += prod(weight.shape) * pixels
        if name.endswith("attn1.to_q") and "time_stack" not in name:    # those of SVD look along the few frames
            total += 2 * pixels ** 2 * weight.shape[0]
    return total
