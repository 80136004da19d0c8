"""Predictors, in menu order. A new one is a file here and a line below."""
from ...registry import Registry
from .automatic import Automatic
from .base import Predictor
from .divided_differences import DividedDifferences
from .hold import Hold

PREDICTORS = Registry(
    "predictor",
    Automatic,
    DividedDifferences,
    Hold,
)

__all__ = ["PREDICTORS", "Predictor"]
