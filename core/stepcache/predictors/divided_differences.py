"""Newton's divided differences: the polynomial through the last order + 1 snapshots, at their real positions.

    out = sum_k w_k H_k,        w_k = prod_{j != k} (t - t_j) / (t_k - t_j)
    error ~ (n - n_0)^(order + 1), n_0 the last computed step

TaylorSeer (arXiv 2503.06923) divides every difference by the last gap, which is the same thing on an even grid;
here the grid may be uneven, as it is whenever a policy chooses the steps.
"""
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from ...knob import knob

COORDINATES = {
    "step index": lambda step: step.place,
    "log-SNR": lambda step: step.log_snr,
    "sigma": lambda step: -step.sigma,
}


@dataclass(frozen=True)
class DividedDifferences:
    name = "divided differences"
    order: int = knob(1, "1 continues the last change as a line, 2 and 3 bend it. Higher orders win with many steps and short skips.", 1, 3, 1)
    coordinate: str = knob("step index", "What counts as distance between two steps.", choices=tuple(COORDINATES))

    @property
    def history(self) -> int:
        return self.order + 1

    def weights(self, past, at) -> list[float]:
        *t, now = self.positions([*past, at])
        return [prod((now - other) / (own - other) for j, other in enumerate(t) if j != k) for k, own in enumerate(t)]

    def positions(self, steps) -> list[float]:
        """Coordinates of `steps`; steps where they meet (log-SNR is bounded at both ends) go by their index."""
        t = [COORDINATES[self.coordinate](step) for step in steps]
        gaps = [abs(b - a) for a, b in pairwise(t[:-1])]
        return t if all(gap > 1e-6 for gap in gaps) else [step.place for step in steps]

    def reach(self, past, at) -> float:
        return abs(at.place - past[-1].place) ** self.history

    def candidates(self):
        return (self,)
