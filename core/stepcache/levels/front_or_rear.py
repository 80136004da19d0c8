"""Front or rear range: early in the schedule the rear blocks are skipped, later the front blocks.

    n < b N:     out = h + H_rear'      h = blocks 1..L-R (x)       H_rear  = blocks L-R+1..L (h) - h
    n >= b N:    out = blocks R+1..L (x + H_front')                 H_front = blocks 1..R (x) - x

n is the step of N, R the number of blocks in the range, L that of all. From Delta-DiT (arXiv 2406.01125): the front
blocks lay out the outline, which the first steps are about, and the rear blocks the detail, which comes later; so each
is computed while it matters. The paper holds H and computes every K-th step, which is policy 'interval' with predictor
'hold'; any of them does here. Its b and R are set for each model; a half is where it starts from here.

One range is kept at a time, in fp32. Where the phase changes the history begins anew, so that step is computed.
"""
from dataclasses import dataclass

from ...knob import knob
from .base import Unfit
from .of_blocks import OfBlocks

REAR, FRONT = "rear", "front"


@dataclass(frozen=True)
class FrontOrRearRange(OfBlocks):
    name = "front or rear range"
    precise = True
    gates = False       # the front range begins before any block
    border: float = knob(
        0.5, "The share of the steps, from the first on, that skips the rear blocks; the steps after it skip the front blocks.", 0.0, 1.0, 0.05)
    share: float = knob(0.5, "The share of the blocks that a skip leaves out. More saves more and follows the model less closely.", 0.05, 1.0, 0.05)

    def phase(self, step) -> str:
        return REAR if step.index < self.border * step.steps else FRONT

    def spans(self, cache, blocks):
        if not blocks.go_on:
            raise Unfit(f"{blocks.family.name} cannot run blocks after a skipped range")
        total = len(blocks.every)
        count = max(round(self.share * total), 1)
        return ((0, count),) if self.phase(cache.step) == FRONT else ((total - count, total),)
