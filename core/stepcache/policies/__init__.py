"""Policies, in menu order. A new one is a file here and a line below."""
from ...registry import Registry
from .base import Policy, View
from .centred import CentredInterval
from .cg_taylor import CGTaylor
from .easycache import EasyCache
from .error_control import ErrorControl
from .first_block import FirstBlock
from .interval import Interval
from .key_steps import KeySteps
from .magcache import MagCache
from .schedule import Schedule
from .teacache import TeaCache
from .temporal_delta import TemporalDelta
from .zeus import Zeus

POLICIES = Registry(
    "policy",
    ErrorControl,
    Interval,
    FirstBlock,
    TeaCache,
    EasyCache,
    MagCache,
    CGTaylor,
    Zeus,
    Schedule,
    TemporalDelta,
    CentredInterval,
    KeySteps,
)

__all__ = ["POLICIES", "Policy", "View"]
