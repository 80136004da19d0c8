"""Affine maps of a prediction, by least squares over what was predicted and what came.

    actual ~ a guess + b        a = cov(guess, actual) / var(guess),  b = mean(actual) - a mean(guess)

Their tensors are data: measured in a run, or given.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Guess


class Affine(NamedTuple):
    """`gain` and `offset` broadcast over a prediction; they were measured so many steps from what was known."""

    gain: Tensor
    offset: Tensor
    reach: float

    def at(self, reach: float) -> "Affine":
        """The map for a prediction that reaches so far: nearer than where it was measured there is less to correct."""
        share = min(max(reach / max(self.reach, 1e-12), 0.0), 1.0)
        return Affine(1 + share * (self.gain - 1), share * self.offset, reach)

    def mean(self, older: "Affine | None") -> "Affine":
        if older is None or older.gain.shape != self.gain.shape:
            return self
        return Affine((self.gain + older.gain) / 2, (self.offset + older.offset) / 2, (self.reach + older.reach) / 2)

    def __call__(self, value: Tensor) -> Tensor:
        return torch.addcmul(self.offset, self.gain, value.float())


def channels(guess: Guess) -> int:
    """The axis of channels: a latent, which has the shape of its row, and a UNet's feature are [B, C, ...], tokens are [B, N, C]."""
    feature = guess.value.ndim == len(guess.row.shape) == 4
    return 1 if feature or (guess.value.shape == guess.row.shape and guess.value.ndim > 2) else guess.value.ndim - 1


def fit(guess: Tensor, actual: Tensor, reach: float, apart: tuple[int, ...]) -> Affine:
    """The map from `guess` to `actual`, one for each index of the axes `apart`, in fp32; gain 1 where the guess is flat."""
    over = [axis for axis in range(guess.ndim) if axis not in apart]
    x, y = guess.float(), actual.float()
    if not over:        # one element each: nothing to regress on
        return Affine(x.new_ones([1] * x.ndim), x.new_zeros([1] * x.ndim), reach)
    x_mean, y_mean = x.mean(over, keepdim=True), y.mean(over, keepdim=True)
    spread = x - x_mean
    variance = spread.square().mean(over, keepdim=True)
    gain = (spread * y).mean(over, keepdim=True) / variance
    gain = torch.where((variance > 1e-12 * (x_mean.square() + variance)) & gain.isfinite(), gain, 1.0)
    offset = y_mean - gain * x_mean
    return Affine(gain, torch.where(offset.isfinite(), offset, 0.0), reach)
