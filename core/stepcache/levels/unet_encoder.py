"""UNet encoder: on a skip only the output blocks run, from predicted skip connections.

    computed step:   H = (middle feature, skip connections hs_0..hs_(L-1))              kept, per condition
    skipped step:    output blocks (H')
    with noise a, on skips in the second half:   z + a z_T in place of z                z_T: the latent that the run began with

ControlNet's residuals are in H, so none is added on a skip. The host evaluates ControlNet all the same; only guided
output saves that. Encoder propagation of Faster Diffusion (arXiv 2312.09608), which holds H; any predictor does here.
Its key steps are policy 'key steps', and its prior noise is 0.003 where t < 500 of 1000, on key steps too.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from ...knob import knob
from ...store import Row
from .unet import INDEX, UnetLevel, joined, patched, recalled, standing_in


@dataclass(frozen=True)
class UnetEncoder(UnetLevel):
    name = "unet encoder"
    noise: float = knob(
        0.0, "Share of the first noise that is added on skipped steps of the second half, against pictures that turn out too smooth; published: 0.003.",
        0.0, 0.1, 0.001)

    def running(self, call):
        return 0, len(call.network.output_blocks)

    def watch(self, cache, call, compute):
        parts = []      # [middle, hs_(L-1)..hs_0][row], as the output blocks take them

        def look(h, hsp, options):
            taken = (h, hsp) if options["block"][1] == 0 else (hsp,)
            parts.extend([part.clone() for part in tensor.chunk(len(call.rows))] for tensor in taken)     # patches may write into them
            cache.notes.setdefault(INDEX, options[INDEX])
            return h, hsp

        result = compute(transformer_options=patched(call.arguments["transformer_options"], look))
        if len(parts) != len(call.network.output_blocks) + 1:
            return False, result
        for row, own in zip(call.rows, zip(*parts, strict=True), strict=True):
            cache.notes[row] = [(part.shape, part.dtype) for part in own]
            cache.learn(row, torch.cat([part.flatten(1) for part in own], 1))
        return True, result

    def skip(self, cache, call, compute):
        middle, *skips = [joined(list(parts)) for parts in zip(*(self.parts(cache, row) for row in call.rows), strict=True)]
        entered = []

        def enter(h, hsp, options):
            if options["block"][1]:
                return h, hsp
            entered.append(h)
            options[INDEX] = cache.notes[INDEX]
            return middle, hsp

        with standing_in(call.network, [recalled(value) for value in reversed(skips)], list(call.network.output_blocks)):
            result = compute(
                transformer_options=patched(call.arguments["transformer_options"], enter, lambda way, place: way == "output"), control=None)
        return bool(entered), result

    def parts(self, cache, row: Row) -> list[Tensor]:
        shapes = cache.notes[row]
        flat = cache.predict(row).split([shape[1:].numel() for shape, _ in shapes], 1)
        return [part.reshape(shape).to(dtype) for part, (shape, dtype) in zip(flat, shapes, strict=True)]

    def with_prior_noise(self, cache, x: Tensor, flow: bool) -> Tensor:
        """The latent that an evaluation looks at. x = z sqrt(1 + sigma^2), but for a flow, where x = z."""
        if not self.noise:
            return x
        step, row = cache.step, Row(str(x.device), -1, "prior noise", 0, None, tuple(x.shape))
        if step.evaluation == 0:
            cache.store.put(row, step, x.clone())
        kept = cache.store.get(row)
        if not kept or step.place < step.steps / 2 or not cache.skips():
            return x
        scale = 1.0 if flow else ((1 + step.sigma ** 2) / (1 + kept[0].step.sigma ** 2)) ** 0.5
        return x + self.noise * scale * kept[0].value
