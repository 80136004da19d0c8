"""Variance: the prediction is given the standard deviation that the model's own result would have.

    Y = mu + (sigma_ref / sigma) (f - mu)       mu, sigma of the prediction f, per picture

Q&C's variance compensation (arXiv 2503.02508), which takes sigma_ref from a calibration run. Here it goes on from the
two newest computed steps, linear in the step index and in the logarithm, so that it stays positive.

Costs one pass at computed steps and two on a skip, and two numbers per picture. Helps where predictions go flat, as
hold and averages over many snapshots do; an extrapolation that already follows the spread gains nothing.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from ...store import SAME_PLACE
from .base import Guess, Kept

MOST = 2.0      # largest factor, either way


@dataclass(frozen=True)
class Variance:
    name = "variance"

    def start(self):
        return Spreads()


def log_spread(value: Tensor) -> Tensor:
    """Logarithm of the standard deviation of each picture, [B, 1, ...], fp32."""
    over = list(range(1, value.ndim))
    return value.float().std(over, correction=0, keepdim=True).clamp_min(1e-12).log()


@dataclass
class Spreads(Kept):
    """log sigma of the two newest computed steps of each row: (place before, log sigma before, place, log sigma)."""

    def apply(self, guess: Guess) -> Tensor:
        value, known = guess.value.float(), self.tensors.get(guess.row)
        if known is None or len(known) < 4:
            return value
        before, spread_before, place, spread = known
        wanted = spread + (spread - spread_before) * ((guess.step.place - place) / (place - before))
        factor = (wanted - log_spread(value)).exp().nan_to_num(1.0).clamp(1 / MOST, MOST)
        return torch.lerp(value.mean(list(range(1, value.ndim)), keepdim=True), value, factor)

    def learn(self, row, step, actual, guesses) -> None:
        known = self.tensors.get(row, ())
        now = (step.place, log_spread(actual))
        if known and (known[-1].shape != now[1].shape or known[-1].device != now[1].device):
            known = ()
        if known and abs(known[-2] - step.place) < SAME_PLACE:
            known = known[:-2]      # a second evaluation at the same place
        self.keep(row, (*known[-2:], *now))
