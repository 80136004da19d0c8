"""ZEUS: the last change once more, frozen, and in turn with the last snapshot.

    j-th skip in a row:   j odd   out = 2 H_0 - H_1      the same on every odd j
                          j even  out = H_0

ZEUS, arXiv 2604.01552, with its own constants: the gap to the snapshot before is not looked at, so this wants computed
steps about as far apart as one step; divided differences of order 1 are the same thing on real positions.

The late phase of ZEUS, Lagrange interpolation of x0, is left out. x0 = x - sigma d, and what is kept here is d (or what
blocks add, which has no x0): x of the past steps would have to be kept beside it, and x now enters with a weight that
no snapshot has, so it is not a weighted sum of snapshots.
"""
from dataclasses import dataclass

from .base import Predictor, distance


@dataclass(frozen=True)
class Zeus(Predictor):
    name = "ZEUS"
    history = 2

    def weights(self, past, at, gram=None) -> list[float]:
        odd = (at.evaluation - past[-1].evaluation) % 2
        return [-1.0, 2.0] if odd else [0.0, 1.0]

    def reach(self, past, at) -> float:
        return distance(past, at)
