"""Chebyshev ridge: a few Chebyshev polynomials fitted to the last snapshots, blended with the line through the last two.

    tau = 2 n / N - 1,      Phi[k] = T_0 .. T_M (tau_k),      phi = T_0 .. T_M (tau)
    out = (1 - w) line + w phi^T C,      C = (Phi^T Phi + lambda I)^-1 Phi^T H      so      w_k = phi^T (Phi^T Phi + lambda I)^-1 Phi^T

Spectrum, arXiv 2603.01623: M = 4, lambda = 0.1, w 0.5 to 0.8 (the rest is Newton's, of first order here), over the whole
history; here over the last 8. Spectrum's ridge draws every coefficient towards 0, the constant one too, and a prediction
comes out too small. By default it is the departures H_k - H_0 that are fitted, which gives H_0 the weight that is left
of 1: tiny_flux_trained128, 28 steps, every third computed, 38.8 dB becomes 44.4.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from ...knob import knob
from .base import Predictor, distance
from .divided_differences import lagrange


def chebyshev(places, steps: int, degree: int) -> Tensor:
    """T_0 .. T_degree at `places` of a schedule, [len(places), degree + 1], fp64."""
    tau = 2 * torch.tensor(places, dtype=torch.float64) / max(steps, 1) - 1
    columns = [torch.ones_like(tau), tau]
    while len(columns) <= degree:
        columns.append(2 * tau * columns[-1] - columns[-2])
    return torch.stack(columns[:degree + 1], 1)


@dataclass(frozen=True)
class ChebyshevRidge(Predictor):
    name = "Chebyshev ridge"
    blend: float = knob(0.5, "Share of the fitted curve; the rest continues the last change as a line. Spectrum has 0.5 to 0.8.", 0.0, 1.0, 0.05)
    ridge: float = knob(0.1, "How strongly the curve is drawn towards 0, which steadies it. Spectrum has 0.1.", 0.001, 10.0, 0.001)
    degree: int = knob(4, "Highest polynomial of the curve. Spectrum has 4.", 1, 6, 1)
    drawn_to: str = knob("newest", "What the ridge draws the curve to: the newest snapshot, or zero as in Spectrum.", choices=("newest", "zero"))
    history = 3
    depth = 8

    def weights(self, past, at, gram=None) -> list[float]:
        places = [step.place for step in past]
        *known, now = chebyshev([*places, at.place], at.steps, self.degree)
        known = torch.stack(known)
        penalty = self.ridge * torch.eye(known.shape[1], dtype=torch.float64)
        fitted = known @ torch.linalg.solve(known.T @ known + penalty, now)
        if self.drawn_to == "newest":
            fitted[-1] += 1 - fitted.sum()
        line = [0.0] * (len(past) - 2) + lagrange(places[-2:], at.place)
        return [self.blend * a + (1 - self.blend) * b for a, b in zip(fitted.tolist(), line, strict=True)]

    def reach(self, past, at) -> float:
        return distance(past, at)
