"""Profile: the schedule that is best by what Step Cache Calibrate measured on this model, sampler and schedule.

    speed-up s:      round(N / s) computed steps, the ones with the least error
    tolerance e:     the fewest computed steps whose expected error stays within e

Both from one dynamic programme over the errors of all groups of skips (profiles/plan.py), once at the run's start; what
a plan's error comes to in the final latent was measured by check runs. A run that the profile was not made for is
computed in full, and the differing field is told.
"""
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...knob import knob, shown
from ..profiles import Facts, Plan, Profile, no_name

FASTEST = 50.0
NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?")


def aim(target: str | float) -> tuple[str, float] | None:
    """("speed-up", 2.0) of "2.0x", ("tolerance", 0.03) of "0.03" and, from a script, of 0.03; none where it is something else."""
    text = str(target).strip().lower()
    kind, number = ("speed-up", text[:-1]) if text.endswith("x") else ("tolerance", text)
    if isinstance(target, bool) or not NUMBER.fullmatch(number):
        return None
    value = float(number)
    low, high = (1.0, FASTEST) if kind == "speed-up" else (0.0, 1.0)
    return (kind, value) if low <= value <= high else None


def no_aim(target: str | float) -> str:
    return "" if aim(target) else f"expected a speed-up from 1x to {FASTEST:g}x, such as 2.0x, or a relative error from 0 to 1, such as 0.03"


@dataclass(frozen=True)
class FromProfile:
    name = "profile"
    needs_forward = False
    profile: str = knob("calibrated", "The profile's name, as given to Step Cache Calibrate.", wrong=no_name)
    target: str = knob("2.0x", "2.0x computes half of the steps, those that leave the least error. 0.03 computes as few as keep the expected relative "
                               "error of the final latent within 0.03.", wrong=no_aim)
    max_group: int = knob(5, "So many skips in a row at most, if max_consecutive_skips allows it.", 1, 20, 1)

    def skip(self, view) -> bool:
        return False

    def refuses(self, family: str, steps: int, sampler: str) -> str:
        return f"profile '{self.profile}' was not read"

    def bound(self, read: Callable[[str], Profile], run: Facts, longest: int, may_skip: Sequence[bool], looks_back: bool) -> "FromProfile":
        """The policy for one run: with its schedule, or with the reason why it skips nothing.

        longest: most skips in a row; may_skip: for each step, whether anything else forbids to skip it.
        """
        try:
            profile = self.fitting(read, run)
            plan, note = self.planned(profile, profile.plans(min(longest, self.max_group), may_skip, looks_back))
        except ValueError as fault:
            return Bound(**vars(self), why=str(fault))
        return Bound(**vars(self), computed=frozenset(plan.computed), note=note)

    def check(self, read: Callable[[str], Profile], **known: str) -> None:
        """Raise for a profile that is not there, is damaged, or differs in what is known of a run beforehand."""
        self.fitting(read, replace(read(self.profile).facts, **known))

    def fitting(self, read: Callable[[str], Profile], run: Facts) -> Profile:
        """The profile, or a ValueError that says why this run cannot have it."""
        profile = read(self.profile)
        if why := profile.facts.differs(run):
            raise ValueError(f"profile '{self.profile}' does not fit by its {why}")
        return profile

    def planned(self, profile: Profile, plans: dict[int, Plan]) -> tuple[Plan, str]:
        """The plan for the target, and what else is to be said."""
        kind, value = aim(self.target)
        steps, fewest = profile.facts.steps, min(plans)
        if kind == "speed-up":
            wanted = max(math.floor(steps / value + 0.5), 1)
            if wanted < fewest:
                note = f"{shown(self.target)} is {wanted} of {steps} steps, and no fewer than {fewest} can be computed with so many skips in a row"
                return plans[fewest], note
            return plans[wanted], ""
        if not profile.checks:
            raise ValueError(f"profile '{self.profile}' has no check runs, so a tolerance means nothing; calibrate again, or give a speed-up")
        return next(plan for _, plan in sorted(plans.items()) if profile.expected(plan) <= value), ""


@dataclass(frozen=True)
class Bound(FromProfile):
    """Bound to a run."""

    computed: frozenset[int] | None = None      # steps
    why: str = ""                               # nothing is skipped
    note: str = ""

    def skip(self, view) -> bool:
        return self.computed is not None and view.step.index not in self.computed

    def refuses(self, family: str, steps: int, sampler: str) -> str:
        return self.why
