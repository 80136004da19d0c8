"""A profile: what full runs of a model showed, so that later ones know beforehand which steps to skip."""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...step import Clock
from ..error_budget import ErrorBudget
from .facts import Facts
from .plan import Measured, Plan

POWERS = (0.5, 3.0)     # bounds of how a measured error may follow the planned one
FALLS = (1.0, 0.5, 1.5)     # of the error budget's q; the first tells the errors


class Check(NamedTuple):
    """A schedule that was run: the error that its plan told, and the median of what came, relative L2 of the final latent."""

    computed: int
    planned: float
    measured: float


class Polynomial(NamedTuple):
    """TeaCache's, highest power first, from the relative change of `signal` to that of the output; root mean square of what is left."""

    signal: str
    coefficients: tuple[float, ...]
    error: float


@dataclass(frozen=True, eq=False)
class Profile:
    """overlaps: <d_i, d_j> / |D|^2, averaged over the pictures, [N, N] in fp64; D is the final denoised latent.

    each: by name, one number per step, or none where it is not known; see recording.py.
    """

    facts: Facts
    flow: bool
    overlaps: Tensor
    pictures: int
    checks: tuple[Check, ...] = ()
    each: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    teacache: Polynomial | None = None
    magcache: tuple[tuple[float, ...], ...] = ()    # of the positive condition, and of the negative one where there is one
    tables: dict[str, Tensor] = field(default_factory=dict)     # for corrections; see recording.py
    date: str = ""
    pack: str = ""

    def plans(self, longest: int, may_skip: Sequence[bool], looks_back: bool) -> dict[int, Plan]:
        """The best schedule for each count of computed steps.

        The gains fall with the share of noise as the error budget's does at CFG 1, and faster and slower. With guidance they fall no
        faster here: at CFG 3.5 that chose schedules which came less near.
        """
        clock, budget = Clock(list(self.facts.sigmas), self.flow), ErrorBudget(1.0, looks_back)
        steps = [clock.tick(sigma) for sigma in self.facts.sigmas[:-1]]
        gains = [[budget.handed_on * step.noise ** (budget.falls * falls) for step in steps] for falls in FALLS]
        gaps = torch.tensor([step.gap for step in steps], dtype=torch.float64)
        return Measured(self.overlaps, gaps, looks_back).plans(gains, longest, may_skip)

    def expected(self, plan: Plan) -> float:
        """The relative L2 error of the final latent to expect of a plan, by what the checks measured; not a number without any.

        Errors outgrow what was measured on the full run's path, so two checks give a power law.
        """
        known = sorted((check for check in self.checks if check.planned > 0 and check.measured > 0), key=lambda check: check.planned)
        if not known or not plan.error:
            return 0.0 if not plan.error else math.nan
        least, most = known[0], known[-1]
        power = 1.0
        if most.planned > least.planned * 1.05:
            power = min(max(math.log(most.measured / least.measured) / math.log(most.planned / least.planned), POWERS[0]), POWERS[1])
        return math.exp(sum(math.log(check.measured) + power * math.log(plan.error / check.planned) for check in known) / len(known))
