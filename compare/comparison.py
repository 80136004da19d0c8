"""Two batches compared picture by picture: measured, and drawn beside one another with what sets them apart."""
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ..core.report import Report
from .metrics import Scores, scores
from .pictures import check_pair, difference, image_of, notes, pairs
from .sheet import framed, level, side_by_side
from .words import average, brief, measured, summary


@dataclass(frozen=True)
class Comparison:
    sheets: list[Image.Image]   # of one size
    scores: list[Scores]
    notes: list[str]

    @property
    def mean(self) -> Scores:
        return average(self.scores)

    @property
    def text(self) -> str:
        return "\n".join([*summary(self.scores), *self.notes])


def compare(a: Tensor, b: Tensor, reports: tuple[Report | None, Report | None] = (None, None), gain: int = 32,
            progress: Callable[[int], None] = lambda done: None) -> Comparison:
    """`a` is the reference; `progress` is told how many pictures are done."""
    check_pair(a, b)
    names = [name if report is None else f"{name}\n{brief(report)}" for name, report in zip(("A (reference)", "B"), reports, strict=True)]
    sheets, found = [], []
    for mine, other in pairs(a, b):
        found.append(scores(mine, other))
        captions = (*names, f"difference x {gain}\n{measured(found[-1])}")
        sheets.append(framed(side_by_side(image_of(mine), image_of(other), image_of(difference(mine, other, gain)), captions)))
        progress(len(found))
    return Comparison(level(sheets), found, notes(a, b))
