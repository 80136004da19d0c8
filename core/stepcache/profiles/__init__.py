"""Profiles: what calibration measured on a model, kept on disk, and the schedules that follow from it."""
from .facts import Facts
from .files import no_name, read, stamp, write
from .plan import Plan
from .profile import Check, Polynomial, Profile

__all__ = ["Check", "Facts", "Plan", "Polynomial", "Profile", "no_name", "read", "stamp", "write"]
