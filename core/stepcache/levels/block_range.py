"""Block range: F first and B last blocks always run; what those between would have added is predicted.

    computed step:   h_F = blocks 1..F (x)      H = blocks F+1..L-B (h_F) - h_F     kept, per condition
    skipped step:    h_F = blocks 1..F (x)      out = blocks L-B+1..L (h_F + H')

F and B are DBCache's (cache-dit). Embeddings, the blocks that run and the output layer see the present step, so this
injects new information where the other levels only extrapolate; it costs F + B blocks per skip and a snapshot of
every image token, of the text too when blocks after the range read it. ControlNet's residuals up to the first block
of the range are those of the present step.
"""
from dataclasses import dataclass

from ...knob import knob
from ..signal import FIRST_BLOCK, signal_of
from .of_blocks import OfBlocks


@dataclass(frozen=True)
class BlockRange(OfBlocks):
    name = "block range"
    first_blocks: int = knob(
        1, "So many first blocks run on every step, at most all but one. More follow the model more closely and save less; 0 decides before any block.",
        0, 64, 1)
    last_blocks: int = knob(0, "So many last blocks run on every step, after what is predicted. With 1 or more the text tokens are kept too.", 0, 64, 1)

    def resolve(self, policy):
        if signal_of(policy) == FIRST_BLOCK and not self.first_blocks:
            raise ValueError(f"policy '{policy.name}' must see the first blocks run, and first_blocks is 0; set it to 1 or more")
        return self

    def spans(self, cache, blocks):
        """At least one block lies in the range."""
        total = len(blocks.every)
        first = min(self.first_blocks, total - 1)
        last = min(self.last_blocks, total - 1 - first)
        if last and not blocks.go_on:
            cache.report.add_reason(f"{blocks.family.name} cannot run blocks after a skipped range, so last_blocks is 0")
            last = 0
        elif first < self.first_blocks or last < self.last_blocks:
            cache.report.add_reason(f"the model has {total} blocks, so first_blocks is {first} and last_blocks {last}: a skip leaves out one at least")
        return ((first, total - last),)
