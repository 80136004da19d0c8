"""Dynamic modes: the snapshots are taken for the states of a linear system, which then runs on by itself.

    X = [H_0 .. H_{K-2}]  Y = [H_1 .. H_{K-1}]  evenly spaced, newest last      Y ~ A X
    X^T X = V S^2 V^T,      U = X V / S,      A~ = U^T A U = S^-1 V^T (X^T Y) V S^-1
    out = Y V S^-1 A~^(k-1) U^T H_{K-1}             k gaps after the newest

Dynamic mode decomposition (P. Schmid, 2010) with exact modes, which lie in Y and so hold the newest snapshot (Tu et al.,
2014); cache-dit wants 4 evenly spaced snapshots of at most 6, rank tolerance 1e-4 on S and ridge 1e-8 on S^2. All of it
comes out of the K x K dot products, so no more than those is read back, and the result is weights again. k is a
fraction wherever a skip lies within a gap; the power goes by the eigenvalues. Exact for sums of exponentials,
oscillating ones too, where a polynomial runs off.

Where fewer snapshots are evenly spaced or the dot products tell nothing, the line through the last two goes on.
Snapshots of 16 bits are known to about 3 digits: a rank tolerance below 0.003 then fits their rounding.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from ...knob import knob
from ...store import SAME_PLACE
from .base import Predictor, distance
from .divided_differences import lagrange

FEWEST = 4
RIDGE = 1e-8    # of the largest S^2
NOTHING = 1e-9


def evenly_spaced(places) -> tuple[list[int], float]:
    """The longest evenly spaced choice of places that ends with the last one, oldest first, and its gap; of equally long ones the nearest."""
    best: tuple[list[int], float] = ([], 1.0)
    for other in reversed(places[:-1]):
        gap, chosen = places[-1] - other, [len(places) - 1]
        for n in range(len(places) - 2, -1, -1):
            if abs(places[-1] - len(chosen) * gap - places[n]) < SAME_PLACE:
                chosen.insert(0, n)
        if gap > SAME_PLACE and len(chosen) > len(best[0]):
            best = chosen, gap
    return best


@dataclass(frozen=True)
class DynamicModes(Predictor):
    name = "dynamic modes"
    rank_tolerance: float = knob(0.0001, "Modes weaker than this share of the strongest are left out. 0.003 or more for a cache in 16 bits.", 0.0, 0.1, 0.0001)
    history = 2
    depth = 6
    needs_gram = True

    def weights(self, past, at, gram=None) -> list[float]:
        places = [step.place for step in past]
        chosen, gap = evenly_spaced(places)
        if gram is not None and len(chosen) >= FEWEST:
            among = self.among(torch.tensor([[gram[i][j] for j in chosen] for i in chosen], dtype=torch.float64), (at.place - places[-1]) / gap)
            if among is not None:
                told = dict(zip(chosen, among, strict=True))
                return [told.get(n, 0.0) for n in range(len(past))]
        return [0.0] * (len(past) - 2) + lagrange(places[-2:], at.place)

    def among(self, gram: Tensor, k: float) -> list[float] | None:
        """Weights over the evenly spaced snapshots alone; None where their dot products do not tell them."""
        scale = gram.diagonal().max()
        if not torch.isfinite(gram).all() or scale <= 0:
            return None
        gram = gram / scale
        squares, v = torch.linalg.eigh(gram[:-1, :-1])
        if squares[-1] <= 0:
            return None
        kept = squares > self.rank_tolerance ** 2 * squares[-1]
        v = v[:, kept] / (squares[kept] + RIDGE * squares[-1]).sqrt()               # U = X v
        moves, start = v.T @ gram[:-1, 1:] @ v, v.T @ gram[:-1, -1]                  # A~ and U^T H_{K-1}
        try:
            values, modes = torch.linalg.eig(moves)
            powers = torch.where(values.abs() > NOTHING, values ** (k - 1), 0.0)     # of a mode that is gone nothing comes back
            weights = v @ (modes @ (powers * torch.linalg.solve(modes, start.to(modes.dtype)))).real
        except torch.linalg.LinAlgError:
            return None
        return [0.0, *weights.tolist()] if torch.isfinite(weights).all() else None

    def reach(self, past, at) -> float:
        return distance(past, at)
