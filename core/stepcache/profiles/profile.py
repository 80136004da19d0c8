"""A profile: what full runs of a model showed, so that later ones know beforehand which steps to skip."""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ...step import Clock
from ..error_budget import ErrorBudget
from .facts import Facts
from .plan import Plan, allowed, plans

POWERS = (0.5, 3.0)     # bounds of how a measured error may follow the planned one


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
    looks_back: bool = True             # in the runs with schedules
    checks: tuple[Check, ...] = ()
    refined: tuple[Plan, ...] = ()      # schedules that trial runs found to be better than the planned ones with as many computed steps
    each: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    teacache: Polynomial | None = None
    magcache: tuple[tuple[float, ...], ...] = ()    # of the positive condition, and of the negative one where there is one
    date: str = ""
    pack: str = ""

    def plans(self, longest: int, may_skip: Sequence[bool], looks_back: bool) -> dict[int, Plan]:
        """The best schedule for each count of computed steps.

        The error budget's gain is that of CFG 1 whatever the guidance: which steps are the best hangs little on it, and what an
        error comes to is measured by checks. Its own gain at CFG 3.5 chose schedules that came 0.7 dB less near.
        """
        found = plans(self.overlaps, *self.steps(looks_back), longest, may_skip, looks_back)
        for plan in self.refined if looks_back == self.looks_back else ():
            if allowed(plan.computed, longest, may_skip):
                found[len(plan.computed)] = plan
        return found

    def steps(self, looks_back: bool) -> tuple[list[float], list[float]]:
        """Gaps and gains."""
        clock = Clock(list(self.facts.sigmas), self.flow)
        budget = ErrorBudget(1.0, looks_back, self.facts.sampler_function, clock)
        steps = [clock.tick(sigma) for sigma in self.facts.sigmas[:-1]]
        return [step.gap for step in steps], [budget.gain(step) for step in steps]

    def expected(self, plan: Plan) -> float:
        """The relative L2 error of the final latent to expect of a plan, by what the checks measured; not a number without any.

        Errors outgrow what was measured on the full run's path, so two checks give a power law.
        """
        if plan.measured is not None:
            return plan.measured
        known = sorted((check for check in self.checks if check.planned > 0 and check.measured > 0), key=lambda check: check.planned)
        if not known or not plan.error:
            return 0.0 if not plan.error else math.nan
        least, most = known[0], known[-1]
        power = 1.0
        if most.planned > least.planned * 1.05:
            power = min(max(math.log(most.measured / least.measured) / math.log(most.planned / least.planned), POWERS[0]), POWERS[1])
        return math.exp(sum(math.log(check.measured) + power * math.log(plan.error / check.planned) for check in known) / len(known))
