"""Policies, in menu order. A new one is a file here and a line below."""
from ...registry import Registry
from .base import Policy, View
from .error_control import ErrorControl
from .first_block import FirstBlock
from .interval import Interval

POLICIES = Registry(
    "policy",
    ErrorControl,
    Interval,
    FirstBlock,
)

__all__ = ["POLICIES", "Policy", "View"]
