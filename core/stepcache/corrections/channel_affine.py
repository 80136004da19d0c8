"""Channel affine: a gain and an offset for every channel, regressed at computed steps on what would have been predicted.

    X ~ a X' + b                            per picture and channel; X computed, X' predicted for the same step
    out = (1 + s (a - 1)) X' + s b          s = the reach of the skip over that of the measurement, at most 1

The cached half of CacheQuant's decoupled error correction (arXiv 2503.01323), which regresses on calibration prompts for
every step; here the measurements are the run's own, the newest and all before it in equal parts.

Costs, for each competing predictor, three passes over a prediction at a computed step, one on a skip, and two numbers per channel. Helps where a
prediction is off in the same way every time, as hold is while channels keep growing; where a line follows, little.
"""
from dataclasses import dataclass, field

from torch import Tensor

from .affine import Affine, channels, fit
from .base import Guess, Kept


@dataclass(frozen=True)
class ChannelAffine:
    name = "channel affine"

    def start(self, given: dict | None = None):
        return Measured(given=given or {})


@dataclass
class Measured(Kept):
    """An Affine for each row and predictor; `given` ones, by predictor, serve until a row has its own."""

    given: dict = field(default_factory=dict)

    def apply(self, guess: Guess) -> Tensor:
        affine: Affine | None = self.tensors.get((guess.row, guess.predictor)) or self.given.get(guess.predictor)
        return guess.value.float() if affine is None else affine.at(guess.reach)(guess.value)

    def learn(self, row, step, actual, guesses) -> None:
        for guess in guesses:
            key = row, guess.predictor
            self.keep(key, fit(guess.value, actual, guess.reach, (0, channels(guess))).mean(self.tensors.get(key)))
