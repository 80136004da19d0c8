"""Policies, in menu order. A new one is a file here and a line below."""
from ...registry import Registry
from .base import Policy, View
from .centred import CentredInterval
from .error_control import ErrorControl
from .first_block import FirstBlock
from .interval import Interval
from .key_steps import KeySteps

POLICIES = Registry(
    "policy",
    ErrorControl,
    Interval,
    FirstBlock,
    CentredInterval,
    KeySteps,
)

__all__ = ["POLICIES", "Policy", "View"]
