"""Corrections, in menu order. A new one is a file here and a line below."""
from ...registry import Registry
from .base import Correcting, Correction, Guess
from .channel_affine import ChannelAffine
from .none import NoCorrection
from .rectify import Rectify
from .variance import Variance

CORRECTIONS = Registry(
    "correction",
    NoCorrection,
    Variance,
    ChannelAffine,
    Rectify,
)

__all__ = ["CORRECTIONS", "Correcting", "Correction", "Guess", "NoCorrection"]
