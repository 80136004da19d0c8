"""What levels that skip ranges of a transformer's blocks share: which ranges is theirs to say, how is in passage.py.

A share counts every block as one, and so each side module that is of a block's size (families/base.py).
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...families import Unfamiliar
from .base import Seam
from .passage import Passage


@dataclass(frozen=True)
class OfBlocks:
    """
    kept: so many ranges are kept at a time.
    several: a policy may be asked for each of them.
    precise: residuals are kept in fp32. A rounding of theirs is added again on every skip, and the blocks that follow
        make more of it: in bf16 a skip of the very input that was computed is then exact, and else it is not.
    """

    seam: ClassVar = Seam.NETWORK
    gates: ClassVar = True
    serves: ClassVar = "transformer"
    kept: ClassVar = 1
    several: ClassVar = False
    precise: ClassVar = False

    def resolve(self, policy):
        return self

    def spans(self, cache, blocks) -> Sequence[tuple[int, int]]:
        """The first block of each range and the one behind its last, in order; Unfit where the model has no such blocks."""
        raise NotImplementedError

    def evaluate(self, cache, call, compute):
        if cache.broken:
            cache.ran(len(call.rows), 1.0)
            return compute()
        passage = Passage(cache, call, self.spans(cache, call.blocks), self.precise)
        with passage:
            result = compute()
        main, skipped, finished = call.rows[0].ordinal == 0, passage.skipped, passage.finished
        if not finished and main and call.rows[0].patches:
            cache.give_up(f"a patch goes around the first or the last block of a range, so {self.name} cannot skip; choose guided output")
        elif not finished and main and not cache.broken:
            raise Unfamiliar("the first or the last block of a range was never called")
        share = 1.0
        if skipped and finished:
            share = passage.share
        elif skipped:       # nothing put the prediction in
            result = None
            passage.drop()      # memory may be what was lacking
            result = compute()
        cache.ran(len(call.rows), share)
        return result
