"""Newton's divided differences: the polynomial through the last order + 1 snapshots, at their real positions.

    out = sum_k w_k H_k,        w_k = prod_{j != k} (t - t_j) / (t_k - t_j)
    error ~ distance(t_0, t)^(order + 1)       t_0 the last computed step, the distance in the share of noise (base.py)

TaylorSeer (arXiv 2503.06923) divides every difference by the last gap, which is the same thing on an even grid;
here the grid may be uneven, as it is whenever a policy chooses the steps. FoCa's BDF2 predictor (2508.16211) with the
slope of the last gap is order 1: its terms in the gap cancel.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ...knob import knob
from .base import Predictor, distance, distinct, newest

COORDINATES = {
    "step index": lambda step: step.place,
    "log-SNR": lambda step: step.log_snr,
    "sigma": lambda step: -step.sigma,
}


def lagrange(t: Sequence[float], now: float) -> list[float]:
    """Values at `now` of the polynomials that are 1 at one of the positions t and 0 at the others; hold where two meet."""
    if not distinct(t):
        return newest(len(t))
    return [prod((now - other) / (own - other) for j, other in enumerate(t) if j != k) for k, own in enumerate(t)]


@dataclass(frozen=True)
class DividedDifferences(Predictor):
    name = "divided differences"
    order: int = knob(1, "1 continues the last change as a line, 2 and 3 bend it. Higher orders win with many steps and short skips.", 1, 3, 1)
    coordinate: str = knob("step index", "What counts as distance between two steps.", choices=tuple(COORDINATES))

    @property
    def history(self) -> int:
        return self.order + 1

    def weights(self, past, at, gram=None) -> list[float]:
        *t, now = self.positions([*past, at])
        return lagrange(t, now)

    def positions(self, steps) -> list[float]:
        """Coordinates of `steps`; steps where they meet (log-SNR is bounded at both ends) go by their index."""
        t = [COORDINATES[self.coordinate](step) for step in steps]
        return t if distinct(t[:-1]) else [step.place for step in steps]

    def reach(self, past, at) -> float:
        return distance(past, at) ** self.history
