"""Automatic: whichever of hold and divided differences of order 1 and 2 has lately been nearest to the truth.

At every computed step each of them is scored on what it would have said (hindcast.py). Order 3 is left out: with it
among the candidates tiny_flux_trained128 came 1.2 dB less near at 10 of 20 evaluations (euler, cfg 1).
"""
from dataclasses import dataclass

from ...knob import knob
from .base import Predictor
from .divided_differences import COORDINATES, DividedDifferences
from .hold import Hold


@dataclass(frozen=True)
class Automatic(Predictor):
    name = "automatic"
    coordinate: str = knob("step index", "What counts as distance between two steps.", choices=tuple(COORDINATES))

    def candidates(self):
        return (Hold(), *(DividedDifferences(order, self.coordinate) for order in (1, 2)))
