"""Rectify: the predicted change is taken as far as it has proved right, then the linear part of the error is taken off.

    change      v' <- v_0 + phi (v' - v_0)              v' predicted, v_0 the newest computed result
    error       eps = v' - v ~ K v' + B,    out = v' - eps = a v' + b           per picture; v what was computed

Both are measured at computed steps on what would have been predicted, the newest measurement and all before it in
equal parts, and shrink with the reach of the skip over theirs.

ERTACache, arXiv 2508.21091, profiles both beforehand. It writes eps = sigmoid(K v' + B) and makes the sigmoid linear,
x / 4 + 1 / 2; the slope and the constant of that line then cancel and least squares on eps remains, which is an affine map.
Its phi = clip(1 - |v' - v|_1 / |v - v_0|_1, 0, 1) shortens the step, and longer steps afterwards make up for it. A cache
cannot move the sigmas of a sampler, and a gain on d alone leaves the picture short of its way (tiny_flux_trained128,
28 steps, every third computed: hold falls from 38 to 19 dB). So phi is a gain on the change. Least squares,
<v - v_0, v' - v_0> / |v' - v_0|^2, is its best value; the published one never exceeds 1 and comes out smaller, because it takes
every error for too long a step.

Costs, for each competing predictor, six passes over a prediction at a computed step, two on a skip, and three numbers per picture. Helps where
extrapolations overshoot time after time; it costs quality where they miss to changing sides.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...knob import knob
from .affine import Affine, fit
from .base import Guess, Kept

MOST_GAIN = 2.0   # of the gain on a change


def least_squares(guessed: Tensor, actual: Tensor, over: list[int]) -> Tensor:
    return (guessed * actual).sum(over, keepdim=True) / guessed.square().sum(over, keepdim=True)


def published(guessed: Tensor, actual: Tensor, over: list[int]) -> Tensor:
    return (1 - (guessed - actual).abs().sum(over, keepdim=True) / actual.abs().sum(over, keepdim=True)).clamp_max(1.0)


GAINS = {"least squares": least_squares, "as published": published}


@dataclass(frozen=True)
class Rectify:
    name = "rectify"
    gain: str = knob("least squares", "How the gain on the predicted change is measured. As published it never exceeds 1 and is often too small.",
                     choices=tuple(GAINS))

    def start(self):
        return Rectifying(gain=self.gain)


class Rectification(NamedTuple):
    gain: Tensor        # of the affine map, and its offset
    offset: Tensor
    reach: float        # at which all of it was measured
    phi: Tensor

    def __call__(self, guess: Guess) -> Tensor:
        change = Affine(self.phi, torch.zeros_like(self.phi), self.reach).at(guess.reach).gain
        return Affine(self.gain, self.offset, self.reach).at(guess.reach)(torch.lerp(guess.last.float(), guess.value.float(), change))


@dataclass
class Rectifying(Kept):
    """A Rectification for each row and predictor."""

    gain: str = "least squares"

    def apply(self, guess: Guess) -> Tensor:
        known: Rectification | None = self.tensors.get((guess.row, guess.predictor))
        return guess.value.float() if known is None else known(guess)

    def learn(self, row, step, actual, guesses) -> None:
        over = list(range(1, actual.ndim))
        for guess in guesses:
            last, older = guess.last.float(), self.tensors.get((row, guess.predictor))
            phi = GAINS[self.gain](guess.value.float() - last, actual.float() - last, over).nan_to_num(1.0).clamp(0.0, MOST_GAIN)
            affine = fit(torch.lerp(last, guess.value.float(), phi), actual, guess.reach, (0,))
            if older is not None:
                affine, phi = affine.mean(Affine(*older[:3])), (phi + older.phi) / 2
            self.keep((row, guess.predictor), Rectification(*affine, phi))
