"""Adams-Bashforth: the mean, from the last computed step to this one, of the polynomial through the last snapshots.

    w_k = 1 / (t - t_0) integral_{t_0}^{t} l_k(s) ds        l_k the Lagrange polynomials of the last `order` positions

On an even grid, one step ahead: 3/2, -1/2 for order 2; 23/12, -16/12, 5/12 for order 3. That is what the solver of the
same name (Bashforth and Adams, 1883) puts in for the coming step; AB-Cache (arXiv 2504.10540) brought it to caching. It
is the mean over the gap and not the value at its end, so it follows a change half-way, and damps what is not one.
"""
from dataclasses import dataclass
from math import sqrt

from ...knob import knob
from .base import Predictor, distance
from .divided_differences import lagrange

GAUSS = (0.5 - 0.5 / sqrt(3), 0.5 + 0.5 / sqrt(3))     # means of polynomials are exact with these two points up to degree 3


@dataclass(frozen=True)
class AdamsBashforth(Predictor):
    name = "Adams-Bashforth"
    order: int = knob(2, "Snapshots that are used. Higher orders bend the curve; 2 is the steadiest.", 2, 4, 1)

    @property
    def history(self) -> int:
        return self.order

    def weights(self, past, at, gram=None) -> list[float]:
        t = [step.place for step in past]
        points = [lagrange(t, t[-1] + share * (at.place - t[-1])) for share in GAUSS]
        return [sum(values) / len(points) for values in zip(*points, strict=True)]

    def reach(self, past, at) -> float:
        return distance(past, at)
