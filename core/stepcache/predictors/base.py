"""What stands in for a skipped computation: scalar weights over a few past snapshots, out = sum_k w_k H_k."""
from collections.abc import Sequence
from typing import Protocol

from ...step import Step


class Predictor(Protocol):
    """An immutable dataclass with knobs.

    history: snapshots it needs; with fewer it is not asked.
    weights: one per snapshot of `past`, which has `history` entries, newest last.
    reach:   how far `at` lies from what is known; its error is taken to grow in proportion.
    candidates: the predictors that compete by hindcast; most enter alone.
    """

    name: str
    history: int

    def weights(self, past: Sequence[Step], at: Step) -> list[float]: ...

    def reach(self, past: Sequence[Step], at: Step) -> float: ...

    def candidates(self) -> tuple["Predictor", ...]: ...
