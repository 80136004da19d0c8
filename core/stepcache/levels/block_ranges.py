"""Block ranges: a list says which ranges of blocks are skipped, each with a residual of its own; all other blocks run.

    skipped step:    h <- h + H'_r for every range r of the list,  h <- block (h) for every block in none

After ProfilingDiT (arXiv 2504.03140), which sorts blocks by how much their attention looks at the foreground and skips
those of one list; blocks that follow each other share a residual. Its lists for the 40 blocks of Wan 2.1 14B:

    background:  0, 2-7, 10-20, 25-32, 37-38
    foreground:  1, 3, 8-9, 22, 24, 28-30, 32, 34-39

A policy that can be asked for a range by itself, such as temporal delta, decides for each; with any other all ranges
are skipped or none. Memory: one snapshot for each range, in fp32.
"""
import re
from dataclasses import dataclass
from functools import cache

from ...knob import knob, shown
from ..signal import FIRST_BLOCK, signal_of
from .base import Unfit
from .of_blocks import OfBlocks

RANGE = re.compile(r"\s*([0-9]{1,6})\s*(?:(-)\s*([0-9]{0,6})\s*)?")


@cache
def ranges_of(text: str) -> tuple[tuple[int, int | None], ...]:
    """First and last block of each range of "0-3, 7, 10-"; None stands for the last block of all. None at all where the text is something else."""
    ranges: list = []
    for part in text.split(","):
        found = RANGE.fullmatch(part)
        first, dash, last = found.groups() if found else (None, None, None)
        if first is None:
            return ()
        last = int(first) if dash is None else int(last) if last else None
        overlaps = bool(ranges) and (ranges[-1][1] is None or int(first) <= ranges[-1][1])
        if overlaps or (last is not None and last < int(first)):
            return ()
        ranges.append((int(first), last))
    return tuple(ranges)


def no_ranges(text: str) -> str:
    return "" if ranges_of(text) else (
        "expected ranges of block numbers from 0 on, each behind the one before, such as 0-3, 7, 10-18, or 20- for all from 20 on")


@dataclass(frozen=True)
class BlockRanges(OfBlocks):
    name = "block ranges"
    several = precise = True
    ranges: str = knob(
        "1, 3-", "The blocks that a skip leaves out, counted from 0 over all stacks: 0-3, 10-18 are two ranges, 20- is all from 20 on. "
        "Each range keeps what it adds; blocks in none always run.", wrong=no_ranges)

    def resolve(self, policy):
        if signal_of(policy) == FIRST_BLOCK and ranges_of(self.ranges)[0][0] == 0:
            ranges = shown(self.ranges)
            raise ValueError(f"policy '{policy.name}' must see the first blocks run, and ranges '{ranges}' begins with block 0; begin at 1 or later")
        return self

    @property
    def kept(self) -> int:
        return len(ranges_of(self.ranges))

    def spans(self, cache, blocks):
        total, family = len(blocks.every), blocks.family.name
        found = tuple((first, total if last is None else last + 1) for first, last in ranges_of(self.ranges))
        if found[-1][0] >= total or found[-1][1] > total:
            raise Unfit(f"ranges '{shown(self.ranges)}' names a block behind the last, and {family} has {total} here, 0 to {total - 1}")
        if (found[0][1] < total) and not blocks.go_on:
            raise Unfit(f"{family} cannot run blocks after a skipped range")
        return found
