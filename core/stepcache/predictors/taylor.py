"""Taylor, as TaylorSeer defines it: differences of differences over computed steps, each divided by the last gap.

    D_0 = H_n,        D_{i+1}(n) = (D_i(n) - D_i(n')) / (n - n')        n' the computed step before n
    out = sum_{i <= order} D_i k^i / i!                                 k steps after n

TaylorSeer, arXiv 2503.06923; order 1 in its FLUX release, 2 in its FLUX table, 4 for DiT. On an even grid D_2 is the
second derivative up to the first order of the gap; divided differences are the polynomial through the snapshots, here
and where the grid is uneven. While fewer snapshots are there than the order wants, the order is lower, as in the original.
"""
from dataclasses import dataclass
from math import factorial

from ...knob import knob
from .base import Predictor, distance, distinct, newest


@dataclass(frozen=True)
class Taylor(Predictor):
    name = "Taylor"
    order: int = knob(2, "Derivatives that are used. TaylorSeer has 1 or 2 for FLUX and video, up to 4 for DiT.", 1, 4, 1)
    history = 2

    @property
    def depth(self) -> int:
        return self.order + 1

    def weights(self, past, at, gram=None) -> list[float]:
        places = [step.place for step in past]
        if not distinct(places):
            return newest(len(past))
        before: list[list[float]] = []      # D_0, D_1, ... of the snapshot before, as weights over `past`
        for n in range(len(past)):
            now = [newest(n + 1) + [0.0] * (len(past) - n - 1)]
            for earlier in before[:self.order]:
                now.append([(a - b) / (places[n] - places[n - 1]) for a, b in zip(now[-1], earlier, strict=True)])
            before = now
        k = at.place - places[-1]
        return [sum(derivative[j] * k ** i / factorial(i) for i, derivative in enumerate(before)) for j in range(len(past))]

    def reach(self, past, at) -> float:
        return distance(past, at) ** len(past)
