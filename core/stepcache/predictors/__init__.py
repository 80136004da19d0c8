"""Predictors, in menu order. A new one is a file here and a line below."""
from ...registry import Registry
from .adams_bashforth import AdamsBashforth
from .automatic import Automatic
from .base import Gram, Predictor
from .chebyshev import ChebyshevRidge
from .divided_differences import DividedDifferences
from .dmd import DynamicModes
from .hold import Hold
from .taylor import Taylor
from .zeus import Zeus

PREDICTORS = Registry(
    "predictor",
    Automatic,
    DividedDifferences,
    Hold,
    Taylor,
    Zeus,
    AdamsBashforth,
    ChebyshevRidge,
    DynamicModes,
)

__all__ = ["PREDICTORS", "Gram", "Predictor"]
